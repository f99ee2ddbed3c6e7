"""`loramix chat` on tiny runs: answers and who gave them, every command, Ctrl-C, the lines of earlier chats."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PrefixTuningConfig, get_peft_model

from loramix import LoramixConfig
from loramix.cli.chatting import line_history
from loramix.cli.chatting.answering import Answering, context_of
from loramix.cli.chatting.conversation import Answer, Conversation, Turn
from loramix.cli.chatting.streaming import TextStream
from loramix.cli.chatting.voices import Routed, Voice
from loramix.cli.main import run
from loramix.data.reading import read_file
from loramix.errors import DataError, Problems
from loramix.methods import method_named
from loramix.models import load_base, load_tokenizer
from loramix.opening import open_model, open_run
from loramix.tuner.routes import Route
from tests import tiny

LABEL = r"\[(?:red|green|blue) \d+%\] "
# This terminal's Ctrl-C is for this process, which listens to it: a job in the background (as CI may be) does not.
CONTROLS = (
    "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
)


def _base(folder: Path) -> Path:
    """A base that goes on until it is stopped, and reads 1024 tokens."""
    tiny.save_base(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [0, 1, 2]}))
    return folder


def _run(folder: Path, base: Path, method: str, model: Any) -> Path:
    """What `train` leaves of a run, as far as `chat` reads it."""
    folder.mkdir()
    settings = {
        "method": method,
        "output_dir": str(folder),
        "model_name_or_path": str(base),
        "data": {"domains": {name: str(folder / name) for name in tiny.EXPERTS}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    model.save_pretrained(folder / "model", save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _base(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def moa(base: Path) -> Path:
    return _run(base.parent / "moa", base, "moa", tiny.moa(load_base(str(base))))


@functools.cache
def _opened(folder: Path) -> tuple[Any, Any]:
    return open_model(open_run(folder)[1], open_run(folder)[0])


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types lines at a terminal, or sends them through a pipe; returns (exit code, output, errors)."""
    monkeypatch.setattr("loramix.opening.open_model", lambda _, folder: _opened(folder.path))

    def talked(folder: Path, lines: list[str], *options: str, at_terminal: bool = True) -> tuple[int, str, str]:
        waiting = iter(lines)

        def typed(prompt: str) -> str:
            assert prompt == ("> " if at_terminal else "")
            try:
                line = next(waiting)
            except StopIteration:
                raise EOFError from None
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: at_terminal))
        code = run(["chat", str(folder), "--max-new-tokens", "4", *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return talked


# ---- answers ------------------------------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_a_prompt_word_for_word(moa: Path, talk, tmp_path: Path):
    file = tmp_path / "x.jsonl"
    code, out, err = talk(moa, ["one", f"/save {file}", "//two", "", "three"], at_terminal=False)
    assert (code, err) == (0, "")
    assert len(re.findall(LABEL, out)) == 3
    assert not file.exists()


def test_a_pipe_ends_with_the_input_and_a_terminal_too(moa: Path, talk):
    assert talk(moa, ["one"], at_terminal=False)[0] == 0
    code, out, _ = talk(moa, ["one"])
    assert code == 0
    assert out.startswith("moa. /help lists the commands. An empty line ends.\n[")
    assert talk(moa, ["", "one"])[1].count("[") == 0
    assert talk(moa, ["one", "^C", "two"])[0] == 130


def test_each_turn_is_routed_and_answered_on_the_whole_conversation(moa: Path, base: Path, talk, tmp_path: Path):
    file = tmp_path / "talk.jsonl"
    talk(moa, ["one", "two", f"/save {file}"], "--system", "be brief")
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    model, tokenizer = tiny.moa(load_base(str(base))), load_tokenizer(str(base))
    text = tokenizer.apply_chat_template(messages[:4], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    way = model.route(**ids)[0]
    assert (messages[4]["expert"], messages[4]["probability"]) == (way.expert, pytest.approx(way.probability, abs=1e-4))
    written = model.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert messages[4]["content"] == answer


def test_drawn_answers_follow_the_seed(moa: Path, talk):
    drawn = ["--temperature", "1.5", "--max-new-tokens", "12", "--expert", "red"]
    first, again, other = (talk(moa, ["one"], *drawn, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other
    assert talk(moa, ["one"], "--max-new-tokens", "12", "--expert", "red")[1] not in (first, other)


def test_wrong_options_are_refused_before_the_first_prompt(moa: Path, talk, monkeypatch):
    code, out, err = talk(moa, ["one"], "--expert", "rad")
    assert (code, out) == (2, "")
    assert '--expert rad: no such expert. Expected one of red, green, blue, base. Did you mean "red"?' in err
    code, _, err = talk(moa, ["one"], "--abstain")
    assert code == 2
    assert "not calibrated" in err
    code, _, err = talk(moa, ["one"], "--abstain", "--expert", "red")
    assert code == 2
    assert "contradict each other" in err
    monkeypatch.setattr(tiny, "CHATML", "{{ raise_exception('no system turns') }}")
    monkeypatch.setattr("loramix.opening.open_model", lambda *_: (_opened(moa)[0], tiny.tokenizer()))
    code, _, err = talk(moa, ["one"], "--system", "be brief")
    assert code == 2
    assert "--system: the base's chat template cannot render it: no system turns" in err


def test_a_character_of_several_tokens_is_said_when_it_is_whole():
    tokenizer = tiny.tokenizer()
    said: list[str] = []
    stream = TextStream(tokenizer, said.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer("a€é\U0001f600b", add_special_tokens=False)["input_ids"]:
        stream.put(torch.tensor([token]))
    assert said == ["a", "€", "é", "\U0001f600", "b"]
    stream.put(torch.tensor([tokenizer("€", add_special_tokens=False)["input_ids"][0]]))
    stream.end()
    assert "".join(said) == stream.text
    assert stream.text.endswith("b\ufffd")


def test_nothing_a_model_writes_steers_the_terminal(moa: Path, talk, monkeypatch):
    def answer(self, prompt, voice, stream, stopped):
        stream.text = "a\x1b[2Jb\x9bc\n\td"
        stream.end()

    monkeypatch.setattr(Answering, "answer", answer)
    assert "a[2Jbc\n\td" in talk(moa, ["one"])[1]
    assert "a\x1b[2Jb\x9bc\n\td" in talk(moa, ["one"], at_terminal=False)[1]


# ---- who answers --------------------------------------------------------------------------------------------------


def test_expert_pins_lists_and_routes_again(moa: Path, talk):
    lines = ["/expert green", "one", "/expert", "/expert base", "one", "/expert grin", "/expert auto", "one", "/expert"]
    code, out, err = talk(moa, lines)
    assert code == 0
    assert re.search(rf"\[green\] .*\n  red\n\* green\n  blue\n  base\n\[base\] .*\n{LABEL}", out, re.DOTALL)
    assert "error: grin: no such expert. Expected one of red, green, blue, base, auto. Did you mean" in err
    assert "green answers from now on." in err
    assert err.endswith("the routers choose from now on.\nnone is pinned: the routers choose.\n")


def test_a_pinned_expert_says_what_it_says_alone(moa: Path, base: Path, talk):
    tokenizer, model = load_tokenizer(str(base)), tiny.moa(load_base(str(base)))
    ids = tokenizer("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    for expert in ("blue", "base"):
        written = model.generate(**ids, expert=expert, max_new_tokens=4, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert talk(moa, ["one"], "--expert", expert, at_terminal=False)[1] == f"[{expert}] {answer}\n"


def test_the_base_answers_where_no_expert_fits_and_says_why():
    class Model:
        experts = tiny.EXPERTS
        found = Route("base", "last", {"red": 0.7}, {}, score=1.2345, threshold=0.4)

        def route(self, **_: Any) -> list[Route]:
            return [self.found]

    voices = Routed(Model(), method_named("moa"), None, None)
    voice = voices.voice({}, None)
    assert voice == Voice("[base: no expert fits, score 1.23 > 0.40] ", {"expert": "base"}, "base")
    Model.found = replace(Model.found, expert="red", score=0.1)
    assert voices.voice({}, None) == Voice("[red 70%] ", {"expert": "red"}, "red", 0.7)
    Model.found = replace(Model.found, decision="per_layer")
    assert voices.voice({}, None).told == {"decision": "per_layer", "abstain": None}


def test_route_shows_the_table_for_a_text_or_for_the_last_prompt(moa: Path, talk):
    code, out, err = talk(moa, ["/route", "/route [b]what?[/b]", "/expert red", "one", "/route"])
    assert code == 0
    assert "error: nothing was asked yet. Write a prompt first." in err
    assert re.search(r"\[b\]what\?\[/b\]\s*\n-> \w+ \(by last\)", out)
    assert re.search(r"\none\s*\n-> (red|green|blue) \(by last\)", out)
    assert out.count("probability") == 2
    assert out.count("layers") == 2


def test_compare_answers_again_and_changes_nothing(moa: Path, talk):
    lines = ["/compare", "one", "/compare red base", "/compare", "/compare red rod", '/compare "red', "/history"]
    code, out, err = talk(moa, lines)
    assert code == 0
    pattern = rf"\n({LABEL})(.*?)\n\[red\] .*?\n\[base\] (.*?)\n{LABEL}(.*?)\n\[base\] (.*?)\n> one\n({LABEL})(.*?)\n$"
    found = re.search(pattern, out, re.DOTALL)
    label, answer, base, routed, again, label_kept, kept = found.groups()
    assert (answer, base, label) == (routed, again, label_kept)
    assert kept == answer
    assert "error: nothing was asked yet" in err
    assert "error: rod: no such expert" in err
    assert "No closing quotation" in err


def test_a_method_that_is_told_the_domain(base: Path, talk):
    torch.manual_seed(1)
    config = LoramixConfig(method="moelora-task", domains=tiny.EXPERTS, r=8, num_experts=4, init_lora_weights=False)
    model = get_peft_model(load_base(str(base)), config)
    folder = _run(base.parent / "told", base, "moelora-task", model)
    lines = [
        "one",
        "/expert",
        "/expert blue",
        "/expert auto",
        "/expert base",
        "/route",
        "/compare",
        "/compare red base",
    ]
    code, out, err = talk(folder, lines, "--expert", "red", "--max-new-tokens", "8")
    assert code == 0
    assert "* red\n  green\n  blue\n[blue] " in out
    *_, blue, base_says, red, base_again = re.split(r"\[(?:blue|base|red)\] ", out)
    assert base_says.strip() == base_again.strip()
    assert len({blue, base_says, red}) == 3
    assert out.split("\n", 1)[1].startswith(red.rstrip("\n"))  # the first answer was red's, without a label
    assert "blue answers from now on." in err
    assert "error: nothing is routed here: this method is told the domain." in err
    assert "error: base: no such expert. Expected one of red, green, blue." in err
    assert "settles no expert for a prompt, so there is nothing to show" in err
    code, _, err = talk(folder, ["one"])
    assert code == 2
    assert "--expert is missing: this method is told the domain" in err


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_methods_in_which_nothing_can_be_chosen(method: str, base: Path, talk):
    model = load_base(str(base))
    torch.manual_seed(1)
    if method == "lora":
        model = get_peft_model(model, LoramixConfig(method="lora", r=4, init_lora_weights=False))
    elif method == "prefix":
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    folder = _run(base.parent / method, base, method, model)
    lines = ["one", "/expert", "/expert red", "/route", "/compare", "/compare red"]
    code, out, err = talk(folder, lines, "--max-new-tokens", "8")
    assert code == 0, err
    assert err.count(f"error: method {method} settles no expert for a prompt, so none can be pinned.") == 2
    assert "so there is nothing to show" in err
    if method == "full":
        assert err.count("so no base is left to compare with") == 2
    else:
        answer, again, alone = re.split(rf"\n\[(?:{method}|base)\] ", out.split("\n", 1)[1].rstrip("\n"))
        assert answer == again
        assert alone != answer
    assert talk(folder, ["one"], "--expert", "red")[0] == 2
    assert talk(folder, ["one"], "--abstain")[0] == 2


# ---- the conversation ---------------------------------------------------------------------------------------------


def test_history_undo_and_clear(moa: Path, talk):
    lines = ["/history", "one", "//two", "/undo", "/history", "/undo", "/undo", "three", "/clear", "/history", "four"]
    code, out, err = talk(moa, [*lines, "/history"], "--system", "be brief")
    assert code == 0
    assert err.split("\n")[:3] == ["nothing was said yet.", "taken back: /two", "taken back: one"]
    assert "error: nothing was asked yet" in err
    assert "the conversation begins anew." in err
    assert re.search(rf"system: be brief\n> one\n{LABEL}", out)
    assert re.search(rf"system: be brief\n> four\n{LABEL}.*\n$", out, re.DOTALL)
    assert "> three" not in out


def test_save_writes_rows_that_loramix_reads(moa: Path, talk, tmp_path: Path):
    (tmp_path / "there.json").write_text("mine")
    names = ["no/talk.json", "talk.txt", "there.json", "talk.json", "talk.jsonl"]
    lines = [f"/save {tmp_path / name}" for name in names]
    code, _, err = talk(moa, ["/save", lines[3], "ein Wort", *lines, "/expert red", "two", lines[4]])
    assert code == 0
    said = ["/save needs a file", "so there is nothing to save", "cannot be written", "ending '.txt'", "not written by"]
    for number, problem in enumerate(said):
        assert problem in err.split("error: ")[number + 1]
    assert (tmp_path / "there.json").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.json", "talk.json", "talk.jsonl"}
    for name, turns in (("talk.json", 1), ("talk.jsonl", 2)):
        problems = Problems(name)
        (record,) = read_file(tmp_path / name, problems, domain="d")
        assert not problems
        assert len(record.messages) == 2 * turns
        assert record.messages[0].content == "ein Wort"
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert row["messages"][1]["expert"] in tiny.EXPERTS
    assert 0 < row["messages"][1]["probability"] < 1
    assert row["messages"][3].keys() == {"role", "content", "expert"}


def test_a_turn_without_text_is_not_saved():
    talk = Conversation()
    talk.turns = [Turn("a", Answer(" ")), Turn("b", Answer("B", expert="red", cut=True))]
    assert talk.as_row() == {
        "messages": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "B", "expert": "red", "cut": True},
        ]
    }


def test_help_quit_and_what_is_no_command(moa: Path, talk):
    code, out, err = talk(moa, ["/help", "/histroy", "/", "/QUIT", "one"])
    assert code == 0
    for name in ("/expert", "/route", "/compare", "/history", "/undo", "/clear", "/save", "/help", "/quit"):
        assert f"\n{name}" in out
    assert '/histroy: no such command. Did you mean "/history"?' in err
    assert "/: no such command." in err
    assert "[" not in out.split("An empty line ends.\n")[-1]


def test_the_oldest_turns_are_left_out_when_the_context_is_full(moa: Path, talk):
    long = "x" * 350  # each letter a token; two and their answers fit into 1024 tokens, three do not
    code, out, err = talk(moa, ["a" + long, "b" + long, "c" + long, "d" + long, "e" * 1100, "/history"])
    assert code == 0
    assert err.count("the oldest turns are left out of what is sent") == 1
    assert re.search(r"error: the prompt has 11\d\d tokens, .* the model reads 1024 together with its answer", err)
    assert re.findall(r"^> (.)", out, re.MULTILINE) == list("abcd")
    code, _, err = talk(moa, ["e" * 1100, "one"], at_terminal=False)
    assert code == 3


def test_what_is_sent_when_the_context_is_full():
    model = tiny.moa(tiny.llama(vocab=len(tiny.tokenizer())))
    tokenizer = tiny.tokenizer()
    talk = Conversation("S")
    talk.turns = [Turn(letter * 100, Answer(letter)) for letter in "abc"]
    assert context_of(model) == 512
    prompt = Answering(model, tokenizer, 128, 0.0).read(talk.asking("d" * 120))
    text = tokenizer.decode(prompt.batch["input_ids"][0], skip_special_tokens=True)
    assert prompt.left_out == 2
    assert prompt.room == 128
    assert text.startswith("system\nS\nuser\nccc")
    assert Answering(model, tokenizer, 20, 0.0).read(talk.asking("d" * 120)).left_out == 1
    alone = Answering(model, tokenizer, 128, 0.0).read(talk.asking("d" * 450))
    assert alone.left_out == 3
    assert 0 < alone.room < 50
    with pytest.raises(DataError, match="Shorten the prompt"):
        Answering(model, tokenizer, 128, 0.0).read(talk.asking("d" * 512))


# ---- Ctrl-C and the lines of earlier chats ------------------------------------------------------------------------


def _pressing(monkeypatch, after: int, times: int = 1) -> None:
    """Presses Ctrl-C once a stream has got some tokens, the first of which is the prompt."""
    put = TextStream.put
    came: list[int] = []

    def pressed(self: TextStream, tokens: torch.Tensor) -> None:
        put(self, tokens)
        came.append(1)
        if after <= len(came) < after + times:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextStream, "put", pressed)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_the_answer_and_not_the_program(times: int, moa: Path, talk, monkeypatch, tmp_path: Path):
    _pressing(monkeypatch, after=4, times=times)
    file = tmp_path / "talk.json"
    before = signal.getsignal(signal.SIGINT)
    code, out, err = talk(moa, ["one", "two", f"/save {file}"], "--max-new-tokens", "40", "--expert", "red")
    assert code == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert out.count(" [cut]\n") == 1
    assert "wrote" in err
    _, first, _, second = json.loads(file.read_text())[0]["messages"]
    assert first["cut"] is True
    assert 0 < len(first["content"]) <= 4
    assert len(second["content"]) > 10
    assert "cut" not in second


def test_a_prompt_whose_answer_was_stopped_before_it_began_is_taken_back(moa: Path, talk, monkeypatch):
    voice = Routed.voice

    def slow(self: Routed, batch: Any, choice: str | None) -> Voice:
        signal.raise_signal(signal.SIGINT)
        return voice(self, batch, choice)

    monkeypatch.setattr(Routed, "voice", slow)
    code, _, err = talk(moa, ["one", "/history"])
    assert code == 0
    assert "stopped before the first word; the prompt was taken back.\nnothing was said yet." in err


def test_ctrl_c_while_a_command_works_ends_the_command(moa: Path, talk, monkeypatch):
    monkeypatch.setattr(Routed, "route", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, err = talk(moa, ["/route some text", "/history"])
    assert code == 0
    assert err == "stopped.\nnothing was said yet.\n"


def test_ctrl_c_ends_a_comparison_and_a_pipe(moa: Path, talk, monkeypatch):
    with monkeypatch.context() as patch:
        _pressing(patch, after=6 + 3)  # the first answer is the prompt and four tokens
        code, out, _ = talk(moa, ["one", "/compare red green", "/history"])
        assert code == 0
        assert "[red]" in out
        assert "[green]" not in out
    with monkeypatch.context() as patch:
        _pressing(patch, after=3)
        assert talk(moa, ["one", "two"], at_terminal=False)[0] == 130


class Readline:
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def clear_history(self) -> None:
        self.lines.clear()

    def add_history(self, line: str) -> None:
        self.lines.append(line)


def test_lines_are_kept_for_the_next_chat_and_only_for_their_user(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = line_history.history_file()
    assert path == tmp_path / "state" / "loramix" / "chat_history"
    first = line_history.LineHistory(path)
    first.load(Readline())
    for line in ("one", "one", " ", "zwei\nZeilen", "/help"):
        first.add(line)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)
    path.write_text(path.read_text() + "half a li\n")
    readline = Readline()
    second = line_history.LineHistory(path)
    second.load(readline)
    assert readline.lines == ["one", "zwei\nZeilen", "/help"]
    for number in range(2 * line_history.MOST):
        second.add(f"line {number}")
    assert path.stat().st_mode & 0o777 == 0o600
    line_history.LineHistory(path).load(readline)
    assert readline.lines == [f"line {number}" for number in range(line_history.MOST, 2 * line_history.MOST)]
    assert len(path.read_text().splitlines()) == line_history.MOST
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    nowhere = line_history.LineHistory(tmp_path / "file" / "chat_history")
    nowhere.add("one")
    nowhere.add("two")
    assert capsys.readouterr().err.count("lines are not kept for the next chat") == 1
    nothing = line_history.LineHistory(None)
    nothing.load(readline)
    nothing.add("one")
    assert readline.lines == []


def test_nothing_is_kept_of_a_pipe(moa: Path, talk, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    talk(moa, ["one"], at_terminal=False)
    assert list(tmp_path.iterdir()) == []


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        code = f"{CONTROLS}from loramix.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def interrupt(self) -> int:
        """Presses Ctrl-C at the prompt as somebody does, again where nothing happens, and returns the exit code.

        CPython's readline shows the prompt before it waits for keys: a signal between the two is seen only with the
        next key or signal.
        """
        for _ in range(5):
            self.type("\x03")
            try:
                return self.process.wait(20)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"does not end: {self.seen!r}")

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Returns what came up to a pattern, which is then done with."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready = select.select([self.ours], [], [], max(0, until - time.monotonic()))[0]
            assert ready, f"no {pattern!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.ours, 65536).decode(errors="replace")
            except OSError:  # the other side closed
                raise AssertionError(f"no {pattern!r} in {self.seen!r}") from None
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_a_real_terminal_ctrl_c_and_arrow_keys(moa: Path, tmp_path: Path):
    history = tmp_path / "loramix" / "chat_history"
    history.parent.mkdir()
    history.write_text('"first"\n"of an earlier chat"\n')
    arguments = ["chat", str(moa), "--max-new-tokens", "900", "--expert", "red"]
    terminal = Terminal(arguments, XDG_STATE_HOME=str(tmp_path))
    try:
        terminal.wait_for("An empty line ends.*> ")
        terminal.type("\x1b[A\r")  # up
        terminal.wait_for(r"of an earlier chat.*\[red\] .")
        terminal.type("\x03")
        terminal.wait_for(r" \[cut\]\r\n.*> ")
        terminal.type("\x1b[A\x1b[A\r")
        terminal.wait_for(r"first.*\[red\] .")
        terminal.type("\x03")
        terminal.wait_for(r" \[cut\]\r\n.*> ")
        terminal.type("/history\r")
        assert terminal.wait_for(r"/history.*\[cut\].*\[cut\]\r\n.*> ").count("[red]") == 2
        assert terminal.interrupt() == 130
    finally:
        terminal.close()
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert lines == ["first", "of an earlier chat", "first", "/history"]
    assert history.stat().st_mode & 0o777 == 0o600
