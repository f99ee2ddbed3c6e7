"""A base whose settings name code is refused, and its code not run, unless the caller names that base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loramix.errors import ModelError
from loramix.models import load_base, load_skeleton, load_tokenizer
from loramix.models.base import layers_of
from loramix.models.trust import VARIABLE
from tests import tiny

CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A base with code beside it that leaves a file where it is run."""
    base = tmp_path / "base"
    tiny.save_base(base)
    (base / "own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    _set(base, "config.json", auto_map={"AutoConfig": "own.OwnConfig"}, model_type="own")
    return base


def _set(base: Path, file: str, **settings: object) -> None:
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**content, **settings}))


@pytest.mark.parametrize("load", [load_base, load_skeleton, load_tokenizer])
def test_code_beside_a_base_is_not_run(load, hostile: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=rf"config.json: auto_map names code .* {VARIABLE}={hostile}"):
        load(str(hostile))
    assert not (tmp_path / "canary").exists()


def test_the_caller_may_trust_one_base(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, f"other/base, {hostile}")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelError, match="Unrecognized configuration class"):  # its own, which has no model
        load_skeleton(str(hostile))
    assert (tmp_path / "canary").exists(), "the code of a trusted base is run; else this test would show nothing"
    monkeypatch.setenv(VARIABLE, "other/base")
    with pytest.raises(ModelError, match="auto_map"):
        load_base(str(hostile))


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "own.Model"}}),
        ("config.json", {"trust_remote_code": True}),
        ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
        ("config.json", {"attn_implementation": "someone/kernel"}),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "own.Config"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}),
    ],
)
def test_whatever_names_code_is_refused(file: str, settings: dict[str, object], tmp_path: Path):
    tiny.save_base(tmp_path / "base")
    _set(tmp_path / "base", file, **settings)
    with pytest.raises(ModelError, match=rf"{file}: "):
        load_base(str(tmp_path / "base"))


def test_settings_that_are_no_json_are_said_to_be(tmp_path: Path):
    tiny.save_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("[" * 100_000)
    for load in (load_base, load_tokenizer, layers_of):
        with pytest.raises(ModelError, match=r"config.json: is no JSON"):
            load(str(tmp_path / "base"))
