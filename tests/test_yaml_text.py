"""YAML from anybody: mutated settings end in a ConfigError or an experiment, bombs in a line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramix.errors import ConfigError
from loramix.experiment import as_yaml, load
from loramix.yaml_text import DEEPEST, NotReadable, parse_yaml

EXAMPLES = int(os.environ.get("LORAMIX_YAMLS", "150"))
"""`make torture` reads 5,000."""
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
VALUES = (
    *("-1", "0", "1e999", ".nan", "-.inf", "0x10", "1_000", "9" * 5000, "~", "true", "''", '"', "[", "]", "{}", "{a"),
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary zz", "!!set {a}", "!x y", "&a [*a]"),
    *("*nowhere", "&b x", "2026-13-45", "2026-11-23", "12:60:61", "<<: {r: 8}", "{[1]: 2}", "? a", "- a", "|", ">-"),
    *("\x00", "\x85", "\xad", "\t", "---", "...", "é" * 200, "../../x", "[[]]", "%TAG"),
)


def _bomb(lines: int, aliases: int) -> str:
    first = "a0: &a0 [x]\n"
    return first + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * aliases)}]\n" for n in range(1, lines))


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A recipe with one to four changes: of a value, a letter, a line."""
    lines = draw(st.sampled_from(RECIPES)).read_text(encoding="utf-8").splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        line, kind = lines[at], draw(st.sampled_from(("value", "letter", "gone", "twice", "indent", "insert", "swap")))
        if kind == "value":
            lines[at] = f"{line.partition(':')[0]}: {draw(st.sampled_from(VALUES))}"
        elif kind == "letter":
            cut = draw(st.integers(0, len(line)))
            lines[at] = line[:cut] + draw(st.characters(codec="utf-8")) + line[cut + draw(st.integers(0, 1)) :]
        elif kind == "insert":
            lines.insert(at, draw(st.sampled_from(VALUES)))
        elif kind == "twice":
            lines.insert(at, line)
        elif kind == "indent":
            lines[at] = " " * draw(st.integers(1, 5)) + line
        elif kind == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif len(lines) > 1:
            del lines[at]
    return "\n".join(lines)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=mutated())
def test_mutated_settings_are_read_or_refused(text: str, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.getbasetemp() / "mutated.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        experiment = load(file).experiment
    except ConfigError:
        pass
    else:
        kept = as_yaml(experiment)
        file.write_text(kept, encoding="utf-8")
        assert as_yaml(load(file).experiment) == kept


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_bomb(12, 10), "aliases stand for more than"),
        (_bomb(40, 2), "aliases stand for more than"),
        ("a: &a [*a]", "an alias stands for what it is part of"),
        ("a: &a {b: *a}", "an alias stands for what it is part of"),
        ("a: " + "[" * (DEEPEST + 5) + "]" * (DEEPEST + 5), "nested deeper"),
        ("a: " + "[" * 50_000, "nested deeper"),
        ("a: x" + "y" * 1_000_001, "more than the 1000000 that are read"),
        ("a: !!python/object/apply:os.system [touch /tmp/loramix-canary]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 2026-13-45", "month must be in"),
        ("a: " + "9" * 5000, "digits"),
    ],
    ids=lambda value: value[:24],
)
def test_a_hostile_text_is_refused_soon_in_a_line(text: str, said: str):
    started = time.process_time()
    with pytest.raises(NotReadable, match=said) as refused:
        parse_yaml(text)
    assert time.process_time() - started < 5
    assert "\n" not in str(refused.value)
    assert not Path("/tmp/loramix-canary").exists()


def test_what_is_read_is_what_yaml_says():
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 3}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}
