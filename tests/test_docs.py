"""The documents tell the truth: links lead somewhere, verbs and settings exist, the README's example runs."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from loramix.settings import AdapterSettings, DataSettings, Experiment
from loramix.training.settings import TrainingSettings
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path):
    for name in re.findall(r"`((?:tests|recipes|benchmarks|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_verbs_exist():
    from typer.main import get_command

    from loramix.cli.main import app

    verbs = set(get_command(app).commands)
    for page in PAGES:
        blocks = re.findall(r"```\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)
        commands = "\n".join(block or inline for block, inline in blocks)
        for verb in re.findall(r"^loramix ([a-z]+)", commands, re.MULTILINE):
            assert verb in verbs, f"{page.name}: loramix {verb}"


def test_every_setting_is_described():
    text = (ROOT / "docs/settings.md").read_text()
    names = {*Experiment.model_fields, *DataSettings.model_fields, *AdapterSettings.model_fields}
    names |= {field.name for field in fields(TrainingSettings)}
    for name in names - {"data", "adapter", "training", "search"}:
        assert f"`{name}`" in text or f".{name}`" in text, name


def test_defaults_in_the_table_are_the_code():
    text = (ROOT / "docs/settings.md").read_text()
    settings = TrainingSettings()
    assert "| 3e-3 |" in text
    assert settings.router_learning_rate == pytest.approx(3e-3)


def test_readme_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from peft import get_peft_model

    import loramix

    folder = str(tiny.save_base(tmp_path / "base"))
    mixture = get_peft_model(loramix.load_base(folder), loramix.LoramixConfig(experts=["finance", "medicine"]))
    mixture.save_pretrained(tmp_path / "model")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 11
    code = code.replace("load_base()", f"load_base({folder!r})").replace(
        "load_tokenizer()", f"load_tokenizer({folder!r})"
    )
    code = code.replace("runs/demo/model", str(tmp_path / "model"))
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # our own README
    assert "-> " in capsys.readouterr().out
