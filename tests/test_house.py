"""The rules of the house: imports go down, files stay short, no drawer for odds and ends, each method is complete."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "loramix"
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up. A file may import from lower floors and from its own part, never from above or from a neighbour.
FLOORS = [
    {"errors", "labels", "precision", "processes", "segments"},
    {"routing", "run_folder", "cache", "environment", "yaml_text"},
    {"losses", "wheels", "reports", "checkpoints", "journal"},
    {"data", "routers", "experts"},
    {"methods", "models"},
    {"tuner"},
    {"adapters"},
    {"training", "evaluation"},
    {"settings"},
    {"adapter_settings", "corpus"},
    {"contradictions"},
    {"experiment"},
    {"preparation"},
    {"opening", "budget", "prompt_store", "identity"},
    {"building", "going_on", "planning", "resuming", "results"},
    {"pipeline", "comparison", "lifecycle", "serving"},
    {"cli"},
]
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}
# training/settings.py is a plain value; the experiment reads it, and nothing of training reads the experiment.
OUTSIDE = {"__init__", "__main__", "on_import"}


def _part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loramix."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("loramix.")}
    return found


def test_every_part_has_a_floor():
    assert {_part(path) for path in FILES} - OUTSIDE == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path):
    part = _part(path)
    if part in OUTSIDE:
        return
    for imported in _imports(path) - {part}:
        assert FLOOR_OF[imported] < FLOOR_OF[part], f"{part} imports {imported}"


def test_files_are_short_and_named_for_one_idea():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_functions_are_short():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(documented.splitlines())
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


def test_public_things_are_documented():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                is_verb = _part(path) == "cli"
                assert is_verb or ast.get_docstring(node), f"{path.name}: {node.name}"


def test_nothing_unsafe_is_called():
    forbidden = ("import pickle", "from pickle", "pickle.", "torch.load(", "yaml.load(", "eval(", "exec(")
    forbidden += ("shell=True", "trust_remote_code=True")
    for path in FILES:
        text = path.read_text().replace("model.eval()", "").replace(".eval()", "")
        for word in forbidden:
            assert word not in text, f"{path}: {word}"


def test_every_method_has_a_page_and_a_recipe():
    from loramix.methods import METHODS

    for name in METHODS:
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file(), name
        assert list((ROOT / "recipes").glob(f"{name}*.yaml")), name
