"""lm-eval on models of every kind: against plain forwards, against its own HFLM, and from the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PrefixTuningConfig, get_peft_model
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from loramix.cli.main import run
from loramix.data.choices import read_choice
from loramix.data.collation import Example
from loramix.data.domains import read_unseen
from loramix.data.prompts import encode
from loramix.data.records import Message, Record
from loramix.errors import ConfigError, DataError
from loramix.evaluation.asking import asking_of
from loramix.evaluation.benchmark_tasks import rows_of, write_tasks
from loramix.evaluation.benchmarks import run_benchmarks
from loramix.evaluation.choice import choice_measured, letter_ids
from loramix.evaluation.continuations import likelihoods
from loramix.evaluation.scoring import score
from tests import method_cases as cases
from tests import tiny

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from loramix.evaluation.harness_model import HarnessModel  # noqa: E402

RECIPES = Path(__file__).parent.parent / "recipes" / "lm_eval"
TOKENIZER = tiny.tokenizer()
VOCAB = len(TOKENIZER)
WORDS = ["iron", "moon", "dog", "seven", "vitamin", "river", "glass", "north", "paper", "stone"]


def _base() -> torch.nn.Module:
    return tiny.llama(vocab=VOCAB)


def _moa(**settings: Any) -> torch.nn.Module:
    """A mixture whose routers are of different minds about different prompts."""
    model = tiny.moa(_base(), **settings)
    for name, parameter in model.named_parameters():
        if "loramix_router" in name:
            torch.manual_seed(5)
            parameter.data = torch.randn(parameter.shape)
    return model


def _prefix() -> torch.nn.Module:
    torch.manual_seed(2)
    return get_peft_model(_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "base": _base,
    "lora": lambda: cases.build("lora", _base()).eval(),
    "moa": _moa,
    "mola": lambda: cases.build("mola", _base()).eval(),
    "mixlora": lambda: cases.build("mixlora", _base()).eval(),
    "prefix": _prefix,
}


def _question(number: int, options: int) -> Record:
    texts = [f"{WORDS[(number + k) % 10]}{' or so' * (k % 2)}" for k in range(options)]
    row = {"question": f"What is {WORDS[number % 10] * (number % 3 + 1)}, {number}?", "choices": texts}
    prompt, right, choices = read_choice({**row, "answer": number % options})
    return Record((Message("user", prompt), Message("assistant", right)), "d", f"here:{number}", choices=choices)


def _with_system(record: Record) -> Record:
    return Record((Message("system", "Be brief."), *record.messages), "d", record.source, choices=record.choices)


QUESTIONS = [_question(number, 3 + number % 3) for number in range(12)]
QUESTIONS[4] = _with_system(QUESTIONS[4])


def _own(model: torch.nn.Module, folder: Path, records: Sequence[Record], **how: Any) -> list[list[tuple[float, bool]]]:
    """What lm-eval makes of each letter of each question."""
    write_tasks(folder, {"d": records})
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    asked = HarnessModel(model, TOKENIZER, **how)
    found = lm_eval.evaluate(asked, manager.load(["own"]), apply_chat_template=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["own_d"], key=lambda sample: sample["doc_id"])
    accuracy = [sample["acc"] for sample in samples]
    assert found["results"]["own_d"]["acc,none"] == pytest.approx(sum(accuracy) / len(accuracy))
    return [[tuple(one) for one in sample["filtered_resps"]] for sample in samples]


def _ids(record: Record) -> list[int]:
    encoded = encode(TOKENIZER, record)
    return encoded.input_ids[: encoded.prompt_length]


def _told(model: Any, kind: str, ids: Sequence[int]) -> dict[str, Any]:
    """The routing of a prompt, settled by `route`, as an argument of a forward."""
    if kind != "moa":
        return {}
    route = model.route(input_ids=torch.tensor([list(ids)]))[0]
    return {"domain_ids": torch.tensor([tiny.EXPERTS.index(route.expert)])}


@torch.no_grad()
def _by_hand(model: Any, context: Sequence[int], continuation: Sequence[int], **told: Any) -> tuple[float, bool]:
    """One unpadded forward over a context and its continuation."""
    ids = torch.tensor([[*context, *continuation]])
    wanted = torch.tensor(list(continuation))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **told).logits
    logits = logits[0, len(context) - 1 : -1].double()
    each = logits.log_softmax(dim=1).gather(1, wanted.unsqueeze(1))
    return float(each.sum()), bool((logits.argmax(dim=1) == wanted).all())


def _ask(*pairs: tuple[Any, ...], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, number, (None, number, 1)) for number, pair in enumerate(pairs)]


# ---- the same questions, asked by lm-eval and by loramix -------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_lm_eval_and_plain_letter_logits_agree(kind: str, tmp_path: Path):
    model = MODELS[kind]()
    found = _own(model, tmp_path, QUESTIONS, batch_size=5)
    chosen = []
    for record, letters in zip(QUESTIONS, found, strict=True):
        ids = _ids(record)
        told = _told(model, kind, ids)
        chosen.append(str(told))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **told).logits[0, -1]
        options = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "ABCDE"[: len(record.choices)]]
        wanted = logits.double().log_softmax(dim=0)[options]
        assert [value for value, _ in letters] == pytest.approx(wanted.tolist(), abs=1e-4)
        assert [greedy for _, greedy in letters] == [option == int(logits.argmax()) for option in options]
        assert max(range(len(letters)), key=lambda k: letters[k][0]) == int(wanted.argmax())
    if kind == "moa":
        assert len(set(chosen)) > 1, "the routers sent all prompts to one expert"


@pytest.mark.parametrize("kind", ["base", "moa", "mola"])
def test_lm_eval_and_our_own_score_choose_the_same_letters(kind: str, tmp_path: Path):
    model = MODELS[kind]()
    examples = [Example(encode(TOKENIZER, record), 0, record) for record in QUESTIONS]
    letters = letter_ids(TOKENIZER, examples)
    decision = "last" if kind == "moa" else None
    scores = score(model, examples, pad_token_id=tiny.PAD, decision=decision, letters=letters)
    ours = choice_measured(examples, scores)
    theirs = run_benchmarks(model, TOKENIZER, ["own"], own={"d": QUESTIONS, "none": []}, chat=True)
    right = [
        max(range(len(found)), key=lambda k, found=found: found[k][0]) == record.right
        for record, found in zip(QUESTIONS, _own(model, tmp_path, QUESTIONS), strict=True)
    ]
    assert ours is not None
    assert [stats[0] for stats in ours.stats] == [float(one) for one in right]
    assert list(theirs["tasks"]) == ["own_d"]
    task = theirs["tasks"]["own_d"]
    assert task["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
    assert (task["version"], task["n_shot"], task["samples"], task["of"]) == ("1.0", 0, 12, 12)
    assert theirs["groups"]["own"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))


def test_the_prompt_is_the_one_of_training():
    """A system turn, the template, and no line break moved to the answer."""
    asked = HarnessModel(_base(), TOKENIZER)
    for one in (QUESTIONS[0], _with_system(QUESTIONS[0])):
        history = [{"role": m.role, "content": m.content} for m in one.messages[:-1]]
        context, answer = asked._encode_pair(asked.apply_chat_template(history), one.response)
        encoded = encode(TOKENIZER, one)
        assert context == encoded.input_ids[: encoded.prompt_length]
        assert answer == encoded.input_ids[encoded.prompt_length :][: len(answer)]


def test_a_base_without_chat_template_is_asked_as_it_was_trained():
    bare = tiny.tokenizer()
    bare.chat_template = None
    asked = HarnessModel(_base(), bare)
    turns = [{"role": "user", "content": "how?"}]
    context, answer = asked._encode_pair(asked.apply_chat_template(turns), "A")
    encoded = encode(bare, Record((Message("user", "how?"), Message("assistant", "A")), "d", "here"))
    assert [*context, *answer, bare.eos_token_id] == encoded.input_ids
    turns.append({"role": "assistant", "content": "The answer is"})
    assert asked.apply_chat_template(turns, add_generation_prompt=False) == "how?\n\nThe answer is"


# ---- the router ------------------------------------------------------------------------------------------------------


def test_the_router_never_sees_the_continuation():
    model = _moa()
    contexts = [TOKENIZER(f"{word} and {chr(97 + 2 * k)}")["input_ids"] for k, word in enumerate(WORDS)]
    ends = [TOKENIZER(text)["input_ids"] for text in (" yes", " a longer ending, 0123456789", "?", " zzz")]
    pairs = [(context, end) for context in contexts for end in ends]
    found = likelihoods(
        model, pairs, asking=asking_of(model, None), pad_token_id=tiny.PAD, max_length=512, batch_size=6
    )
    by_context, by_whole = [], []
    for (context, end), got in zip(pairs, found, strict=True):
        told = _told(model, "moa", context)
        by_context.append(int(told["domain_ids"]))
        by_whole.append(int(_told(model, "moa", [*context, *end])["domain_ids"]))
        assert got.log_probability == pytest.approx(_by_hand(model, context, end, **told)[0], abs=1e-4)
    assert len(set(by_context)) > 1
    assert by_context != by_whole, "no continuation would have changed the decision: the test shows nothing"


@pytest.mark.parametrize("name", ["red", "blue"])
def test_a_pinned_expert_answers_everything(name: str, tmp_path: Path):
    model = _moa()
    found = _own(model, tmp_path, QUESTIONS, expert=name)
    told = {"domain_ids": torch.tensor([tiny.EXPERTS.index(name)])}
    for record, letters in zip(QUESTIONS, found, strict=True):
        wanted = [_by_hand(model, _ids(record), [TOKENIZER.convert_tokens_to_ids("A")], **told)[0]]
        assert letters[0][0] == pytest.approx(wanted[0], abs=1e-4)


def test_a_model_that_is_told_the_domain_wants_it_pinned():
    model = cases.build("moelora-task", _base()).eval()
    with pytest.raises(ConfigError, match=r"moelora-task must be told the domain.*red, green, blue"):
        HarnessModel(model, TOKENIZER)
    context, end = TOKENIZER("how?")["input_ids"], TOKENIZER("so")["input_ids"]
    values = []
    for position, domain in enumerate(cases.DOMAINS):
        asked = HarnessModel(model, TOKENIZER, expert=domain)
        values.append(asked.loglikelihood(_ask(("how?", "so")), disable_tqdm=True)[0][0])
        wanted = _by_hand(model, context, end, domain_ids=torch.tensor([position]))[0]
        assert values[-1] == pytest.approx(wanted, abs=1e-4)
        assert asked.generate_until(_ask(("how?", {"max_gen_toks": 3})), disable_tqdm=True)[0] is not None
    assert len(set(values)) == 3


def test_experts_that_cannot_be_pinned():
    with pytest.raises(ConfigError, match="none can be pinned"):
        HarnessModel(_base(), TOKENIZER, expert="red")
    with pytest.raises(ConfigError, match="none can be pinned"):
        HarnessModel(MODELS["mola"](), TOKENIZER, expert="red")
    with pytest.raises(ConfigError, match=r'no such expert. Did you mean "green"\?.*red, green, blue'):
        HarnessModel(_moa(), TOKENIZER, expert="gren")
    with pytest.raises(ConfigError, match='decision is "pinned"'):
        HarnessModel(_moa(decision="pinned"), TOKENIZER)
    assert HarnessModel(_moa(decision="pinned"), TOKENIZER, expert="red").asking.expert == 0


# ---- against lm-eval's own model of a plain base ---------------------------------------------------------------------

TEXTS = [
    ("How are you", " today"),
    ("", "no context at all"),
    ("", "<|im_start|>user"),
    ("ends in blanks  ", "x"),
    ("a long context " * 9, "and its end"),
    ("x", "y"),
    ("<|im_start|>already begun", "!"),
    ("Question: 1+1\nAnswer:", " 2"),
    ("Question: 1+1\nAnswer:", " 3"),
]


@pytest.mark.parametrize("most", [512, 40])
def test_a_base_scores_as_in_lm_eval_s_own_model(most: int):
    ours = HarnessModel(_base(), TOKENIZER, max_length=most, batch_size=4)
    theirs = HFLM(pretrained=_base(), tokenizer=TOKENIZER, max_length=most, batch_size=2)
    found = ours.loglikelihood(_ask(*TEXTS), disable_tqdm=True)
    wanted = theirs.loglikelihood(_ask(*TEXTS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("most", [512, 16])
def test_whole_texts_are_scored_as_in_lm_eval_s_own_model(most: int):
    texts = [("short",), ("a text that is much longer than sixteen bytes, so it takes windows",), ("x" * 16,), ("",)]
    ours = HarnessModel(_base(), TOKENIZER, max_length=most)
    theirs = HFLM(pretrained=_base(), tokenizer=TOKENIZER, max_length=most)
    found = ours.loglikelihood_rolling(_ask(*texts, kind="loglikelihood_rolling"), disable_tqdm=True)
    wanted = theirs.loglikelihood_rolling(_ask(*texts[:3], kind="loglikelihood_rolling"), disable_tqdm=True)
    assert found == pytest.approx([*wanted, 0.0], abs=1e-3)


@pytest.mark.parametrize("kind", ["base", "moa", "mola"])
def test_what_the_model_writes_itself_is_greedy(kind: str):
    model = MODELS[kind]()
    context = TOKENIZER("Write something")["input_ids"]
    told = {"decision": "last"} if kind == "moa" else {}
    begun = torch.tensor([context])
    written = model.generate(
        input_ids=begun,
        attention_mask=torch.ones_like(begun),
        do_sample=False,
        max_new_tokens=5,
        min_new_tokens=5,
        pad_token_id=tiny.PAD,
        **told,
    )[0, len(context) :].tolist()
    other = [*written[:-1], (written[-1] + 1) % VOCAB]
    pairs = [(context, written), (context, other), (context, written[:2]), (context, [other[-1], *written[1:]])]
    found = likelihoods(model, pairs, asking=asking_of(model, None), pad_token_id=tiny.PAD, max_length=99)
    assert [one.greedy for one in found] == [True, False, True, False]


@pytest.mark.parametrize("kind", ["base", "moa", "mola"])
def test_answers_are_what_the_model_generates_up_to_a_stop(kind: str):
    model = MODELS[kind]()
    asked = HarnessModel(model, TOKENIZER, batch_size=2)
    contexts = ["one", "a second, longer one", "three", "and four"]
    how = {"max_gen_toks": 12, "do_sample": False}
    full = asked.generate_until(_ask(*[(text, {**how, "until": []}) for text in contexts]), disable_tqdm=True)
    for text, got in zip(contexts, full, strict=True):
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        told = {"expert": model.route(input_ids=ids)[0].expert} if kind == "moa" else {}
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=tiny.PAD,
            **told,
        )[0, ids.shape[1] :]
        wanted = TOKENIZER.decode(written, skip_special_tokens=True)
        assert got == wanted.split(TOKENIZER.eos_token)[0]
    stops = [text[len(text) // 2] for text in full]
    mixed = [(text, {**how, "until": [stop]}) for text, stop in zip(contexts, stops, strict=True)]
    cut = asked.generate_until(_ask(*mixed), disable_tqdm=True)
    assert cut == [text.split(stop)[0] for text, stop in zip(full, stops, strict=True)]
    assert cut != full


def test_a_base_writes_as_in_lm_eval_s_own_model():
    """Also where the context is too long and loses its beginning."""
    how = {"max_gen_toks": 6, "do_sample": False, "until": ["\n\n"]}
    contexts = [("short", how), ("begins far away, then comes nearer and at last ends here", how)]
    ours = HarnessModel(_base(), TOKENIZER, max_length=24, batch_size=2)
    theirs = HFLM(pretrained=_base(), tokenizer=TOKENIZER, max_length=24, batch_size=1)
    found = ours.generate_until(_ask(*contexts, kind="generate_until"), disable_tqdm=True)
    assert found == theirs.generate_until(_ask(*contexts, kind="generate_until"), disable_tqdm=True)
    assert all(found)


def test_no_room_for_a_prompt_is_said():
    asked = HarnessModel(_base(), TOKENIZER, max_length=20)
    with pytest.raises(ConfigError, match="up to 20 new tokens, the model reads 20"):
        asked.generate_until(_ask(("x", {"max_gen_toks": 20})), disable_tqdm=True)
    with pytest.raises(DataError, match="a continuation has 21 tokens, the model reads at most 20"):
        asked.loglikelihood(_ask(("x", "y" * 21)), disable_tqdm=True)


def test_a_prefix_takes_some_of_the_room():
    assert HarnessModel(_base(), TOKENIZER).max_length == 512
    assert HarnessModel(_prefix(), TOKENIZER).max_length == 509


def test_a_token_across_the_border_leaves_something_to_score():
    """Where lm-eval cuts the joined text there would be no continuation left (its issues 1053 and 1297)."""
    joined = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    joined.add_tokens([AddedToken("swer", normalized=False)])
    joined.pad_token, joined.eos_token = "<|pad|>", "<|im_end|>"
    asked = HarnessModel(tiny.llama(vocab=VOCAB + 1), joined)
    assert len(joined("Answer")["input_ids"]) == len(joined("Ans")["input_ids"])
    context, rest = asked._encode_pair("Ans", "wer")
    assert (joined.decode(context), joined.decode(rest)) == ("Ans", "wer")


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_rows_hold_all_a_task_may_ask_for():
    (row,) = rows_of([QUESTIONS[1]])
    assert row["question"] == "What is moonmoon, 1?"
    assert row["choices"] == ["moon", "dog or so", "seven", "vitamin or so"]
    assert (row["letters"], row["gold"], row["system"], row["source"]) == (["A", "B", "C", "D"], 1, "", "here:1")
    assert row["prompt"] == QUESTIONS[1].prompt
    prompt, right, choices = read_choice(
        {"context": "It rained.", "question": "Why?", "A": "a", "B": "b", "answer": "B"}
    )
    told = Record((Message("user", prompt), Message("assistant", right)), "d", "", choices=choices)
    assert rows_of([told])[0]["question"] == "It rained.\n\nWhy?"
    with pytest.raises(DataError, match="f:7: is no question with options"):
        rows_of([Record((Message("user", "x"), Message("assistant", "y")), "d", "f:7")])


def test_nothing_to_ask(tmp_path: Path):
    words = Record((Message("user", "x"), Message("assistant", "y")), "d", "f:7")
    with pytest.raises(DataError, match="none of one, two has held-out questions"):
        write_tasks(tmp_path, {"one": [words], "two": []})


def _file(path: Path, count: int = 8) -> Path:
    rows = [
        {
            "question": f"Which is {WORDS[n % 10]}?",
            "choices": {"text": [WORDS[n % 10], WORDS[(n + 3) % 10] * 2], "label": ["A", "B"]},
            "answerKey": "AB"[n % 2],
        }
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def _recipes() -> dict[str, Path]:
    return {yaml.safe_load(path.read_text())["task"]: path for path in sorted(RECIPES.glob("*.yaml"))}


@pytest.mark.parametrize("task", _recipes())
def test_every_recipe_runs_on_local_data(task: str, tmp_path: Path):
    """Options are compared by their texts' likelihoods, or by their letters'; worked out by hand."""
    model = _base()
    file = _file(tmp_path / "questions.jsonl")
    found = run_benchmarks(model, TOKENIZER, [task], folders=[RECIPES], data={task: str(file)}, limit=5)
    one = found["tasks"][task]
    assert (one["samples"], one["of"], one["n_shot"], one["version"]) == (5, 8, 0, "1.0")
    by_letter = "letter" in (RECIPES / yaml.safe_load(_recipes()[task].read_text())["include"]).name
    assert set(one["metrics"]) == ({"acc"} if by_letter else {"acc", "acc_norm"})
    right = {"acc": 0, "acc_norm": 0}
    for row in rows_of(read_unseen({task: str(file)})[task][:5]):  # shuffled by the seed
        question = row["question"]
        if by_letter:
            listed = "".join(f"{a}. {b}\n" for a, b in zip(row["letters"], row["choices"], strict=True))
            context = ("Question: " if "commonsense" in task else "") + f"{question}\n{listed}Answer:"
        else:
            context = question if "openbookqa" in task else f"Question: {question}\nAnswer:"
        options = row["letters"] if by_letter else row["choices"]
        values = [
            _by_hand(model, TOKENIZER(context)["input_ids"], TOKENIZER(f" {option}")["input_ids"])[0]
            for option in options
        ]
        shares = [value / len(option) for value, option in zip(values, options, strict=True)]
        right["acc"] += values.index(max(values)) == row["gold"]
        right["acc_norm"] += shares.index(max(shares)) == row["gold"]
    for metric, measured in one["metrics"].items():
        assert measured["value"] == pytest.approx(right[metric] / 5), metric


def test_every_recipe_is_described():
    page = (RECIPES.parent.parent / "docs" / "benchmarks.md").read_text()
    for task in _recipes():
        assert f"`{task}`" in page, task


def test_what_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = _base()
    with pytest.raises(ConfigError, match=r"nowhere: no such folder"):
        run_benchmarks(model, TOKENIZER, ["x"], folders=[tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"local_mmlu.*cannot be loaded.*--data local_mmlu=FILE"):
        run_benchmarks(model, TOKENIZER, ["local_mmlu"], folders=[RECIPES])
    file = str(_file(tmp_path / "q.jsonl"))
    with pytest.raises(ConfigError, match="data for 'local_arc_easy', which is not asked"):
        run_benchmarks(model, TOKENIZER, ["local_mmlu"], folders=[RECIPES], data={"local_arc_easy": file})
    (tmp_path / "words.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    data = {"local_mmlu": str(tmp_path / "words.jsonl")}
    with pytest.raises(DataError, match=r"words.jsonl:1: is no question with options"):
        run_benchmarks(model, TOKENIZER, ["local_mmlu"], folders=[RECIPES], data=data)
    own = {"d": QUESTIONS[:2]}
    with pytest.raises(ConfigError, match="data for 'own', which is no single task"):
        run_benchmarks(model, TOKENIZER, ["own"], own=own, data={"own": file})
    # What lm-eval has itself is looked through only for names that are nowhere else; here it has nothing.
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda *_, **__: {})
    with pytest.raises(ConfigError, match="'nothing': no such task"):
        run_benchmarks(model, TOKENIZER, ["nothing"])


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of moa on two domains of questions and one of words."""
    folder = tmp_path_factory.mktemp("benchmarks")
    tiny.save_base(folder / "base")
    domains = tiny.toy_domains(folder / "data")
    for name in ("iron", "moon"):
        (folder / name).mkdir()
        for split, count in (("train", 12), ("test", 6)):
            _file(folder / name / f"{split}.jsonl", count)
    settings = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(folder / "base"),
        "data": {
            "domains": {"iron": str(folder / "iron"), "moon": str(folder / "moon"), "adds": domains["adds"]},
            "max_length": 128,
            "overlap": "ignore",
        },
        "adapter": {"r": 4},
        "training": {"max_steps": 2, "learning_rate": 1e-2},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    assert run(["train", str(folder / "toy.yaml")]) == 0
    return folder / "run"


def test_a_run_answers_its_own_questions(trained: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert run(["eval", str(trained), "--benchmark", "own", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["tasks"]) == {"own_iron", "own_moon"}
    assert found["chat_template"] is True
    assert found["model"] == {**found["model"], "method": "moa", "expert": None, "run": str(trained)}
    assert found["lm_eval"] == lm_eval.__version__
    assert found["groups"]["own"]["samples"] == 12
    assert run(["eval", str(trained), "--benchmark", "own", "--limit", "4", "--expert", "iron"]) == 0
    shown = capsys.readouterr().out
    assert "moa, expert iron" in shown
    assert "4 of 6" in shown
    assert re.search(r"own_moon .*acc .*0\.\d{4}", shown)


def test_a_run_answers_a_recipe(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["eval", str(trained), "--benchmark", "local_arc_easy,local_mmlu", "--tasks-dir", str(RECIPES)]
    file = _file(tmp_path / "q.jsonl")
    arguments += ["--data", f"local_arc_easy={file}", "--data", f"local_mmlu={file}", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["tasks"]) == {"local_arc_easy", "local_mmlu"}
    assert found["chat_template"] is False
    assert found["groups"] == {}


@pytest.mark.parametrize("option", [[], ["--no-share-prompts"]])
def test_sharing_prompts_can_be_switched_off(
    option: list[str],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    asked: list[bool] = []
    monkeypatch.setattr("loramix.evaluation.continuations.can_share", lambda model: bool(asked.append(True)))
    arguments = ["eval", str(trained), "--benchmark", "local_arc_easy", "--tasks-dir", str(RECIPES), "--limit", "2"]
    assert run([*arguments, "--data", f"local_arc_easy={_file(tmp_path / 'q.jsonl')}", *option]) == 0
    assert bool(asked) == (not option)


def test_wrong_options_are_said(trained: Path, capsys: pytest.CaptureFixture[str]):
    def said(*more: str) -> str:
        assert run(["eval", str(trained), *more]) == 2
        return capsys.readouterr().err

    assert "--limit, --expert: for benchmarks only" in said("--limit", "3", "--expert", "iron")
    assert "--share-prompts: for benchmarks only" in said("--no-share-prompts")
    assert "'x': expected TASK=FILE" in said("--benchmark", "own", "--data", "x")
    assert "use --limit" in said("--benchmark", "own", "--max-examples", "3")
    assert "Ask own by itself" in said("--benchmark", "own,local_mmlu")
    assert "Did you mean" in said("--benchmark", "own", "--expert", "irn")


def test_without_lm_eval_the_extra_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    capsys.readouterr()
    assert run(["eval", str(trained), "--benchmark", "own"]) == 2
    assert 'pip install "loramix[eval]"' in capsys.readouterr().err
