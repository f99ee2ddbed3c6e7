"""Questions read once for all their options, against each option read with its question: the same likelihoods."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from loramix.evaluation.asking import asking_of
from loramix.evaluation.continuations import Likelihood, Request, likelihoods
from loramix.evaluation.prompt_groups import Group, Row, grouped
from loramix.evaluation.shared_prompts import can_share
from loramix.methods import METHODS
from loramix.routers.abstention import KIND, AbstentionConfig, fitted
from loramix.tuner.abstaining import put
from loramix.tuner.guide import ForwardGuide
from tests import method_cases as cases
from tests import tiny

PICK = random.Random(3)


def _tokens(count: int) -> list[int]:
    return [PICK.randrange(3, 64) for _ in range(count)]


def _requests() -> list[Request]:
    """Questions of 9 to 21 tokens with 1 to 5 options of 1 to 6, some alike but for their last token, in any order."""
    made: list[Request] = []
    for number in range(8):
        question = _tokens(9 + 12 * (number % 3) // 2 + number // 3)
        options = [_tokens(1 + (number + k) % 6) for k in range(1 + number % 5)]
        made += [(question, option) for option in [*options, [*options[-1][:-1], 5]]]
    PICK.shuffle(made)
    return made


REQUESTS = _requests()


def _routers_of_different_minds(model: Any) -> Any:
    """Random weights so large that prompts go to different experts."""
    for name, parameter in model.named_parameters():
        if "loramix_router" in name:
            torch.manual_seed(5)
            parameter.data = torch.randn(parameter.shape)
    return model


def _moa(base: nn.Module | None = None, **settings: Any) -> Any:
    return _routers_of_different_minds(tiny.moa(base, **settings))


def _calibrated(**settings: Any) -> Any:
    """Half of the questions are the base's."""
    model = _moa(**settings)
    guide = ForwardGuide.of(model.get_base_model())
    mixture = guide.active()
    assert mixture is not None
    torch.manual_seed(0)
    part = fitted(torch.randn(30, 32), torch.arange(30) % 3, 3, 8)
    questions = sorted({tuple(question) for question, _ in REQUESTS})
    put(mixture, AbstentionConfig(kind=KIND, layer=mixture.scopes[1], dims=8, threshold=1e9, keep=0.5), part)
    found = [model.route(input_ids=torch.tensor([question]))[0] for question in questions]
    scores = sorted(one.score or 0.0 for one in found)
    middle = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    put(mixture, AbstentionConfig(kind=KIND, layer=mixture.scopes[1], dims=8, threshold=middle, keep=0.5), part)
    return model


def _stock(config: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(tiny.llama(layers=2), config).eval()


def _mistral(window: int | None) -> nn.Module:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        pad_token_id=tiny.PAD,
    )
    return MistralForCausalLM(config).requires_grad_(False).eval()


SHARING: dict[str, Callable[[], Any]] = {
    "base": tiny.llama,
    "gpt2": tiny.gpt2,
    "mistral": lambda: _mistral(None),
    "moa": _moa,
    "moa, gpt2": lambda: _moa(tiny.gpt2()),
    "moa, vote": lambda: _moa(decision="vote"),
    "moa, per layer": lambda: _moa(decision="per_layer"),
    "moa, layer 1": lambda: _moa(decision="layer:1"),
    "moa, mean": lambda: _moa(router={"pooling": "mean"}),
    "moa, reads experts": lambda: _moa(router={"reads": "experts"}),
    "moa, reads experts, per layer": lambda: _moa(router={"reads": "experts"}, decision="per_layer"),
    "moa, abstains": _calibrated,
    "moa, abstains, per layer": lambda: _calibrated(decision="per_layer"),
    **{name: lambda name=name: cases.build(name, tiny.llama(layers=2)).eval() for name in cases.CASES},
}
PLAIN: dict[str, Callable[[], Any]] = {
    "sira with room for few": lambda: cases.build(
        "sira", tiny.llama(layers=2), router={"gate_dropout": 0.0, "eval_capacity_factor": 0.6}
    ).eval(),
    "a window": lambda: _mistral(8),
    "prefix": lambda: _stock(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "stock lora": lambda: _stock(LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])),
}


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    """Counts the tokens of each forward, without padding."""
    fed: list[int] = []

    def count(_: nn.Module, args: Any, kwargs: Any) -> None:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        fed.append(int(mask[:, -ids.shape[1] :].sum()))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield fed
    finally:
        hook.remove()


def _asked(model: Any, requests: Sequence[Request], expert: str | None = None, **how: Any) -> list[Likelihood]:
    told = asking_of(model, expert)
    return likelihoods(model, requests, asking=told, pad_token_id=tiny.PAD, max_length=60, **how)


def _same(one: Sequence[Likelihood], other: Sequence[Likelihood]) -> None:
    values = [found.log_probability for found in one]
    assert values == pytest.approx([found.log_probability for found in other], abs=1e-4)
    assert [found.greedy for found in one] == [found.greedy for found in other]
    assert len({round(value, 3) for value in values}) > len(values) // 2, "all are alike: the test shows nothing"


def test_every_method_is_here():
    assert set(METHODS) <= {*SHARING, *PLAIN, "full"}


@pytest.mark.parametrize("kind", SHARING)
def test_options_behind_a_shared_prompt_are_as_likely_as_behind_their_own(kind: str):
    model = SHARING[kind]()
    expert = "green" if kind == "moelora-task" else None
    with _counted(model) as fed:
        wanted = _asked(model, REQUESTS, expert, share_prompts=False)
        plain = sum(fed)
        fed.clear()
        found = _asked(model, REQUESTS, expert)
        assert sum(fed) < 0.6 * plain
    _same(found, wanted)


@pytest.mark.parametrize("kind", PLAIN)
def test_where_a_cache_would_change_the_answer_nothing_is_shared(kind: str):
    model = PLAIN[kind]()
    assert not can_share(model)
    assert _asked(model, REQUESTS) == _asked(model, REQUESTS, share_prompts=False)


def test_room_counted_in_parts_would_have_changed_the_answer(monkeypatch: pytest.MonkeyPatch):
    """The router that is asked for `in_parts` says no for a reason."""
    model = PLAIN["sira with room for few"]()
    wanted = _asked(model, REQUESTS)
    monkeypatch.setattr("loramix.evaluation.continuations.can_share", lambda model: True)
    found = _asked(model, REQUESTS)
    assert max(abs(a.log_probability - b.log_probability) for a, b in zip(found, wanted, strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["base", "moa", "moa, per layer", "mola", "mixlora"])
def test_neither_the_order_nor_the_size_of_batches_matters(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = SHARING[kind]()
    wanted = _asked(model, REQUESTS, share_prompts=False)
    for batch_size, most in ((1, 4096), (3, 4096), (64, 4096), (8, 50)):
        monkeypatch.setattr("loramix.evaluation.shared_prompts.MOST_TOKENS", most)
        order = list(range(len(REQUESTS)))
        random.Random(batch_size).shuffle(order)
        found = _asked(model, [REQUESTS[number] for number in order], batch_size=batch_size)
        _same(found, [wanted[number] for number in order])


@pytest.mark.parametrize("kind", ["moa", "moa, per layer", "moa, abstains", "moa, abstains, per layer"])
def test_questions_of_one_batch_have_different_experts(kind: str):
    """Else the tests above would not see one question's experts given to another's options."""
    model = SHARING[kind]()
    questions = sorted({tuple(question) for question, _ in REQUESTS})
    experts = [model.route(input_ids=torch.tensor([question]))[0].expert for question in questions]
    assert len(set(experts)) > 1
    assert ("base" in experts) == ("abstains" in kind)


@pytest.mark.parametrize("expert", ["red", "blue"])
def test_a_pinned_expert_answers_behind_shared_prompts_too(expert: str):
    model = _moa()
    with _counted(model) as fed:
        wanted = _asked(model, REQUESTS, expert, share_prompts=False)
        plain = sum(fed)
        fed.clear()
        _same(_asked(model, REQUESTS, expert), wanted)
        assert sum(fed) < 0.6 * plain
    assert wanted != _asked(model, REQUESTS)


# ---- contexts that differ in their end -------------------------------------------------------------------------------


def _merged_at_the_border() -> list[Request]:
    """The last token of each context depends on the option behind it."""
    made: list[Request] = []
    for _ in range(4):
        question = _tokens(PICK.randrange(12, 20))
        made += [([*question[:-1], *_tokens(1 + k % 2)], _tokens(2)) for k in range(4)]
    PICK.shuffle(made)
    return made


@pytest.mark.parametrize("kind", ["base", "mola", "moa", "moa, pinned"])
def test_contexts_share_what_they_have_in_common_unless_a_router_reads_all_of_them(kind: str):
    model = SHARING[kind.partition(",")[0]]()
    expert = "green" if kind == "moa, pinned" else None
    requests = _merged_at_the_border()
    with _counted(model) as fed:
        wanted = _asked(model, requests, expert, share_prompts=False)
        plain = sum(fed)
        fed.clear()
        found = _asked(model, requests, expert)
        assert (sum(fed) < 0.6 * plain) == (kind != "moa")
    _same(found, wanted)


def test_what_is_too_long_loses_the_beginning_of_its_context():
    model = tiny.llama()
    question = _tokens(70)
    requests: list[Request] = [(question, _tokens(1 + k)) for k in range(4)]
    _same(_asked(model, requests), _asked(model, requests, share_prompts=False))


# ---- which rows are a group ------------------------------------------------------------------------------------------


def _row(context: str, rest: str = "") -> Row:
    return Row(tuple(map(ord, context + rest)), len(context))


def _shown(groups: Sequence[Group]) -> list[tuple[str, int]]:
    return sorted(("".join(map(chr, group.shared)), len(group.rows)) for group in groups)


def test_options_of_a_question_are_a_group():
    rows = [_row("a long question", rest) for rest in ("", "x", "yz")] + [_row("another question", "x")]
    rows += [_row("short", "x"), _row("short", "y")]
    groups, left = grouped(rows, same_context=True)
    assert _shown(groups) == [("a long question", 3)]
    assert left == rows[3:]


def test_contexts_join_where_that_saves_more():
    example = "one example for all "
    few = [_row(f"{example}{question}?", rest) for question in "ab" for rest in "12"]
    groups, left = grouped(few, same_context=False)
    assert (_shown(groups), left) == ([(example, 4)], [])
    assert _shown(grouped(few, same_context=True)[0]) == [(f"{example}a?", 2), (f"{example}b?", 2)]
    template = "template "
    long = [_row(f"{template}{question * 30}?", rest) for question in "ab" for rest in "12"]
    assert [count for _, count in _shown(grouped(long, same_context=False)[0])] == [2, 2]


def test_the_order_of_rows_does_not_matter():
    rows = [_row(f"the same beginning {n % 3}" * (1 + n % 2), str(n)) for n in range(12)]
    wanted = _shown(grouped(rows, same_context=False)[0])
    mixed = copy.copy(rows)
    random.Random(1).shuffle(mixed)
    assert _shown(grouped(mixed, same_context=False)[0]) == wanted
