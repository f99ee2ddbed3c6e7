"""The command line on a tiny base and toy domains: the whole main job, and one clear message for each mistake."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loramix.cli.main import run
from tests import tiny


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, data and settings."""
    folder = tmp_path_factory.mktemp("project")
    tiny.save_base(folder / "base")
    settings = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(folder / "base"),
        "controls": ["single_long", "mixed"],
        "data": {"domains": tiny.toy_domains(folder / "data"), "max_length": 64},
        "adapter": {"r": 4, "router": {"pooling": "mean"}},
        "training": {"num_train_epochs": 4, "learning_rate": 1e-2, "router_learning_rate": 3e-2, "logging_steps": 5},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    assert run(["train", str(project / "toy.yaml")]) == 0
    return project / "run"


def test_train_leaves_a_whole_run(trained: Path):
    results = json.loads((trained / "results.json").read_text())
    models = {row["model"] for row in results["rows"]}
    assert models == {"single", "single_long", "mixed", "moa_oracle", "moa_routed"}
    assert all(row["perplexity"] > 1 and row["tokens"] > 0 for row in results["rows"])
    assert set(results["router_accuracy"]) == {"adds", "greets", "shouts"}
    assert results["router_accuracy_overall"]["last"] > 0.9
    assert len(results["examples"]) == 3
    for name in ("config.yaml", "environment.json", "data.json", "log.jsonl", "model/adapter_model.safetensors"):
        assert (trained / name).is_file(), name
    for kind in ("experts", "longer"):
        assert (trained / kind / "adds" / "adapter_config.json").is_file()


def test_stage_two_goes_on_from_where_stage_one_ended(trained: Path):
    entries = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    for domain in ("adds", "greets", "shouts"):
        key = f"loss/{domain}"
        alone = [e[key] for e in entries if e["stage"] == f"expert {domain}" and key in e]
        joint = [e[key] for e in entries if e["stage"].startswith("moa") and key in e]
        assert joint[0] < alone[0], "stage 2 started from fresh experts"


def test_eval_gives_what_train_gave(trained: Path, capsys):
    assert run(["eval", str(trained), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    before = json.loads((trained / "results.json").read_text())
    wanted = [row for row in before["rows"] if row["model"].startswith("moa")]
    for row, other in zip(again["rows"], wanted, strict=True):
        assert (row["domain"], row["model"]) == (other["domain"], other["model"])
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
    assert again["router_accuracy"] == before["router_accuracy"]


def test_a_folder_that_cannot_be_made_is_told_in_a_line(trained: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run(["export", str(trained), "--output-dir", str(tmp_path / "file" / "sub")]) == 7
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")


def test_route_names_the_expert(trained: Path, capsys):
    assert run(["route", str(trained), "--text", "QRSTWXYZQRSTWZYX", "-t", "abcdefgabcdefgab", "--json"]) == 0
    routes = json.loads(capsys.readouterr().out)
    assert [route["expert"] for route in routes] == ["shouts", "greets"]
    assert run(["route", str(trained), "--text", "QRSTWXYZQRSTWZYX", "--decision", "vote"]) == 0
    assert "-> shouts (by vote)" in capsys.readouterr().out


def test_chat_answers_and_says_who(trained: Path, capsys, monkeypatch):
    lines = iter(["QRSTWXYZQRSTWZYX", "QRSTQRST", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(["chat", str(trained), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.count("[shouts") == 2


def test_a_second_run_in_the_same_folder_is_refused(project: Path, trained: Path, capsys):
    assert run(["train", str(project / "toy.yaml")]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_lora_alone(project: Path, tmp_path: Path, capsys, monkeypatch):
    out = f"output_dir={tmp_path / 'lora'}"
    router = ["adapter.router=null", "controls=[]", "max_steps=2"]
    assert run(["train", str(project / "toy.yaml"), out, "method=lora", *router, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in results["rows"]} == {"mixed"}
    assert run(["eval", str(tmp_path / "lora"), "--json"]) == 0
    lines = iter(["hi", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run(["chat", str(tmp_path / "lora"), "--max-new-tokens", "3"]) == 0


def test_demo_writes_the_rows_that_were_promised(project: Path, tmp_path: Path, monkeypatch, capsys):
    from loramix.data import demo as demo_module

    settings = yaml.safe_load((project / "toy.yaml").read_text())
    sources = {d: Path(p) for d, p in settings["data"]["domains"].items()}
    monkeypatch.setattr(demo_module, "demo_data", lambda: sources)
    words = [f"model_name_or_path={project / 'base'}", "max_steps=2", "joint_stage={}"]
    for _ in range(2):  # the second time it replaces its own run
        assert run(["demo", "--out", str(tmp_path / "demo"), "--json", *words]) == 0
    printed = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "}")
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    models = ["base", "single", "single_long", "mixed", "moa_oracle", "moa_routed"]
    assert {(r["domain"], r["model"]) for r in written["rows"]} == {(d, m) for d in sources for m in models}
    assert set(written["router_accuracy"]["adds"]) == {"last", "vote", "per_layer"}
    assert printed["domains"] == written["domains"]


def _yaml(project: Path, tmp_path: Path, **changes: object) -> str:
    settings = yaml.safe_load((project / "toy.yaml").read_text())
    settings["output_dir"] = str(tmp_path / "out")
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_bad_input_gives_one_clear_message_and_writes_nothing(project: Path, tmp_path: Path, capsys):
    data = yaml.safe_load((project / "toy.yaml").read_text())["data"]["domains"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{oops\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "silent.jsonl").write_text('{"prompt": "p", "completion": ""}\n')
    (tmp_path / "labelled.jsonl").write_text('{"prompt": "p", "completion": "c", "domain": "other"}\n')
    cases = [
        ({"data": {"domains": {**data, "adds": str(tmp_path / "bad.jsonl")}}}, 3, "bad.jsonl:2: is not JSON"),
        ({"data": {"domains": {**data, "adds": str(tmp_path / "empty.jsonl")}}}, 3, "'adds' has no rows"),
        (
            {"data": {"domains": {**data, "adds": str(tmp_path / "silent.jsonl")}}},
            3,
            'silent.jsonl:1: "completion" is empty',
        ),
        ({"data": {"path": str(tmp_path / "labelled.jsonl")}}, 3, "label 'other' is not among the domains"),
        ({"data": {"max_lenght": 5}}, 2, 'Did you mean "max_length"'),
        ({"method": "mao", "adapter": {"r": 0}}, 2, "r = 0"),
        ({"model_name_or_path": str(tmp_path / "nowhere")}, 4, "no such folder"),
        ({"model_name_or_path": "nobody/nothing"}, 4, "could not be loaded"),
        ({"data": {"max_length": 8}}, 3, "no training example left within max_length = 8"),
        ({"adapter": {"target_modules": ["q_porj"]}}, 4, 'Did you mean "q_proj"'),
        ({"adapter": {"decision": "layer:9"}}, 2, "no router in layer 9"),
    ]
    for changes, code, message in cases:
        assert run(["train", _yaml(project, tmp_path, **changes)]) == code, message
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists(), message


def test_two_mistakes_are_reported_at_once(project: Path, tmp_path: Path, capsys):
    path = _yaml(project, tmp_path, metod="moa", training={"max_stepz": 3})
    for verb in ("train", "validate"):
        assert run([verb, path]) == 2
        error = capsys.readouterr().err
        assert "2 problems" in error
        assert "metod" in error
        assert "max_stepz" in error


def test_validate_shows_what_a_run_would_use(project: Path, tmp_path: Path, capsys):
    path = _yaml(project, tmp_path, lora_rank=4)
    assert run(["validate", path]) == 0
    out = capsys.readouterr().out
    assert "read lora_rank as adapter.r" in out
    assert "24 to train on, 8 to test on" in out
    assert run(["validate", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"]["adds"] == {"train": 24, "test": 8}
    assert not (tmp_path / "out").exists()


def test_opening_what_is_no_run(tmp_path: Path, capsys):
    for verb in (["eval"], ["chat"], ["route", "--text", "x"]):
        assert run([verb[0], str(tmp_path), *verb[1:]]) == 2
        assert "no run here" in capsys.readouterr().err


def test_methods_and_env(capsys):
    assert run(["methods", "--json"]) == 0
    listed = {method["name"]: method for method in json.loads(capsys.readouterr().out)}
    assert listed["moa"]["losses"] == {"routing_cross_entropy": 0.1}
    assert len(listed) == 21
    assert {"name", "paper", "router", "scope", "losses", "stages"} <= listed["mosld"].keys()
    assert run(["methods", "show", "mosld", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bank"] == {"share": "down", "weight_dropout": 0.1, "combine": "outputs", "split_rank": False}
    assert run(["methods", "show", "mosld"]) == 0
    assert "weight_dropout: 0.1" in capsys.readouterr().out
    assert run(["methods", "show", "mosdl"]) == 2
    assert 'Did you mean "mosl" or "mosld"' in capsys.readouterr().err
    assert run(["methods"]) == 0
    assert "moelora-contrastive" in capsys.readouterr().out
    assert run(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"]


def test_usage_errors_exit_with_two(capsys):
    assert run(["trian"]) == 2
    assert run(["route", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_is_instant_and_imports_no_torch():
    """Processor time, as the wall clock would measure the machine's other work; beside what the libraries of any such
    command line take, as machines differ (0.18 and 0.11 s where this was written)."""
    ours = "import sys; from loramix.cli.main import run; run(['--help']); print('torch' in sys.modules)"
    plain = "import typer, rich.console, rich.table, rich.panel, rich.markdown; print(False)"

    def least(script: str) -> float:
        seconds = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            assert done.stdout.strip().endswith("False")
        return min(seconds)

    assert least(ours) < 4 * least(plain)


def test_demo_never_replaces_another_run(project: Path, trained: Path, tmp_path: Path, monkeypatch, capsys):
    from loramix.data import demo as demo_module

    folder = Path(yaml.safe_load((project / "toy.yaml").read_text())["data"]["domains"]["adds"])
    monkeypatch.setattr(demo_module, "demo_data", lambda: {"one": folder, "two": folder})
    assert run(["demo", "--out", str(trained), f"model_name_or_path={project / 'base'}"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (trained / "model").is_dir()


def test_a_damaged_adapter_is_refused_in_one_line(trained: Path, tmp_path: Path, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    file = copy / "model" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert run(["route", str(copy), "--text", "x"]) == 4
    assert "is cut off" in capsys.readouterr().err
    file.unlink()
    assert run(["route", str(copy), "--text", "x"]) == 4
    (copy / "model" / "adapter_config.json").unlink()
    assert run(["eval", str(copy)]) == 4
    assert "no trained model" in capsys.readouterr().err
