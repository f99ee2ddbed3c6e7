"""Where a domain's rows come from: parts, splits, a root folder, patterns; how many; and what is never learned."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from loramix import ConfigError, DataError
from loramix.cli.main import app
from loramix.corpus import UNSEEN, encode_all, read_all
from loramix.data.domains import read_domains, read_unseen
from loramix.experiment import as_yaml, build, load
from loramix.preparation import prepare
from tests import tiny


def _file(path: Path, names: str, **columns: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"prompt": name, "completion": "x", **columns}) + "\n" for name in names.split())
    )
    return str(path)


def _prompts(records: list[Any]) -> list[str]:
    return sorted(record.prompt for record in records)


def _settings(folder: Path, **data: Any) -> dict[str, Any]:
    names = {f"{d}.jsonl": " ".join(f"{d}{i}" for i in range(10)) for d in "ab"}
    for name, prompts in names.items():
        _file(folder / name, prompts)
    domains = {d: f"{d}.jsonl" for d in "ab"}
    return {"output_dir": str(folder / "out"), "data": {"domains": domains, "root": str(folder), **data}}


def test_a_list_is_one_table_in_parts(tmp_path):
    parts = [_file(tmp_path / f"{n}.jsonl", f"{n}1 {n}2 {n}3") for n in ("p", "q")]
    split = read_domains({"d": parts}, test_fraction=0.3)["d"]
    assert (len(split.train), len(split.test)) == (4, 2)
    assert _prompts(split.train + split.test) == ["p1", "p2", "p3", "q1", "q2", "q3"]


def test_splits_by_name(tmp_path):
    parts = [_file(tmp_path / f"{n}.jsonl", n) for n in ("p", "q", "r", "s")]
    split = read_domains({"d": {"train": parts[:2], "test": parts[2]}})["d"]
    assert (_prompts(split.train), _prompts(split.test)) == (["p", "q"], ["r"])
    split = read_domains({"d": {"train": parts[0], "validation": parts[1:]}})["d"]
    assert (_prompts(split.train), _prompts(split.test)) == (["p"], ["q", "r", "s"])
    split = read_domains({"d": {"train": parts[0], "validation": parts[1], "test": parts[2]}})["d"]
    assert _prompts(split.test) == ["r"]


def test_a_folder_named_for_a_split_gives_that_split_alone(tmp_path):
    folder = tmp_path / "f"
    _file(folder / "train.jsonl", "t1 t2")
    _file(folder / "test.jsonl", "m1")
    split = read_domains({"d": {"train": str(folder), "test": str(folder)}})["d"]
    assert (_prompts(split.train), _prompts(split.test)) == (["t1", "t2"], ["m1"])
    with pytest.raises(DataError, match="f: no such file, and no folder or Hub data set with a validation part"):
        read_domains({"d": {"train": str(folder), "validation": str(folder)}})


def test_parts_that_are_missing_are_named(tmp_path):
    here = _file(tmp_path / "p.jsonl", "p1 p2")
    with pytest.raises(DataError) as caught:
        read_domains({"d": {"train": [here, str(tmp_path / "no.jsonl")], "test": str(tmp_path / "none.jsonl")}})
    message = str(caught.value)
    assert "2 problems" in message
    assert "no.jsonl: no such file or folder" in message
    assert "none.jsonl: no such file, and no folder or Hub data set with a test part" in message
    with pytest.raises(DataError, match="domain 'd' has no rows for training"):
        read_domains({"d": {"test": here}})


def test_patterns(tmp_path):
    for name in ("x/b_test.jsonl", "x/a_test.jsonl", "x/y/c_test.jsonl", "x/a_dev.jsonl"):
        _file(tmp_path / name, name)
    read = read_unseen({"u": str(tmp_path / "x" / "*_test.jsonl")})["u"]
    assert _prompts(read) == ["x/a_test.jsonl", "x/b_test.jsonl"]
    split = read_domains({"d": {"train": str(tmp_path / "x/**/*_test.jsonl"), "test": str(tmp_path / "x/*_dev.*")}})[
        "d"
    ]
    assert (len(split.train), len(split.test)) == (3, 1)
    with pytest.raises(DataError, match=r"z\*\.jsonl: no file is of that pattern"):
        read_domains({"d": str(tmp_path / "z*.jsonl")})


def test_limits_by_domain(tmp_path):
    files = {d: _file(tmp_path / f"{d}.jsonl", " ".join(f"{d}{i}" for i in range(20))) for d in "abc"}
    splits = read_domains(files, max_train_examples={"a": 3, "b": 9}, max_test_examples={"c": 1})
    assert {d: (len(s.train), len(s.test)) for d, s in splits.items()} == {"a": (3, 2), "b": (9, 2), "c": (18, 1)}


def test_unseen_takes_the_rows_to_test_or_all(tmp_path):
    folder = tmp_path / "f"
    _file(folder / "train.jsonl", "t1 t2")
    _file(folder / "dev.jsonl", "v1")
    whole = _file(tmp_path / "w.jsonl", "w1 w2 w3 w4")
    parts = [_file(tmp_path / "p.jsonl", "p1"), _file(tmp_path / "q.jsonl", "q1")]
    sources = {"folder": str(folder), "file": whole, "parts": parts, "named": {"train": whole, "test": parts[0]}}
    read = read_unseen(sources, max_test_examples={"file": 3})
    assert {name: len(records) for name, records in read.items()} == {"folder": 1, "file": 3, "parts": 2, "named": 1}
    assert (read["folder"][0].prompt, read["named"][0].prompt) == ("v1", "p1")
    again = read_unseen(sources, max_test_examples={"file": 3})
    assert [r.prompt for r in again["file"]] == [r.prompt for r in read["file"]]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="unseen domain 'e' has no rows"):
        read_unseen({"e": str(empty)})


def test_one_split_for_many_seeds(tmp_path):
    content = _settings(tmp_path, test_fraction=0.5)

    def tests(**settings: Any) -> list[list[str]]:
        splits, _ = read_all(build({**content, **settings}).experiment)
        return [_prompts(split.test) for split in splits.values()]

    assert tests(seed=1) != tests(seed=2)
    content["data"]["seed"] = 5
    assert tests(seed=1) == tests(seed=2)
    del content["data"]["seed"]
    assert tests(seed=5) == tests(seed=1, data={**content["data"], "seed": 5})


def test_root_is_where_names_are_looked_for(tmp_path, monkeypatch):
    elsewhere = _file(tmp_path / "else" / "c.jsonl", "c1 c2")
    content = _settings(tmp_path / "root", unseen={"u": {"test": ["x/*.jsonl"]}})
    _file(tmp_path / "root" / "x" / "u.jsonl", "u1 u2")
    content["data"]["domains"]["c"] = elsewhere
    monkeypatch.chdir(tmp_path)
    content["data"]["root"] = "root"
    splits, unseen = read_all(build(content).experiment)
    assert list(splits) == ["a", "b", "c"]
    assert _prompts(unseen["u"]) == ["u1", "u2"]
    content["data"]["root"] = "rooot"
    with pytest.raises(ConfigError, match=r"data\.root = 'rooot': no such folder"):
        read_all(build(content).experiment)


def test_data_alone_is_the_root_and_said_so(tmp_path):
    content = _settings(tmp_path, root=None)
    loaded = build(content, [f"data={tmp_path}"])
    assert loaded.experiment.data.root == str(tmp_path)
    assert list(loaded.experiment.data.domains) == ["a", "b"]
    assert f"read data = {tmp_path} as data.root" in loaded.echoes


def test_overrides_do_not_reach_into_the_callers_settings(tmp_path):
    content = _settings(tmp_path)
    before = json.dumps(content)
    assert list(build(content, ["data.domains.c=c.jsonl", "data=elsewhere"]).experiment.data.domains) == ["a", "b", "c"]
    assert json.dumps(content) == before


def test_unseen_examples_have_no_expert(tmp_path):
    _file(tmp_path / "u.jsonl", "u1 u2 u3 u4 u5")
    content = _settings(tmp_path, unseen={"u": "u.jsonl"}, max_test_examples={"u": 2})
    data = encode_all(build(content).experiment, tiny.tokenizer())
    assert list(data.train) == list(data.held) == ["a", "b"]
    assert [example.domain_id for example in data.unseen["u"]] == [UNSEEN, UNSEEN] == [-1, -1]
    assert data.counts["u"].keys() == {"test"}
    assert data.counts["u"]["test"]["examples"] == 2


def test_a_label_of_the_data_is_no_name_for_the_unseen(tmp_path):
    path = _file(tmp_path / "l.jsonl", "a1 a2", task="a")
    other = _file(tmp_path / "u.jsonl", "u1")
    data = {"path": path, "unseen": {"a": other}}
    experiment = build({"output_dir": "o", "method": "lora", "data": data}).experiment
    with pytest.raises(DataError, match=r"data\.unseen: a: is a label of the data too"):
        read_all(experiment)


def test_the_run_opens_from_anywhere(tmp_path, monkeypatch):
    base = tiny.save_base(tmp_path / "base")
    content = _settings(tmp_path / "root", unseen={"u": "x/*.jsonl"}, root="root")
    content["data"]["domains"]["b"] = {"train": ["b.jsonl"], "test": "a.jsonl"}
    content |= {"model_name_or_path": str(base), "output_dir": str(tmp_path / "run")}
    _file(tmp_path / "root" / "x" / "u.jsonl", "u1 u2")
    monkeypatch.chdir(tmp_path)
    prepared = prepare(build(content).experiment, Console(quiet=True))
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    splits, unseen = read_all(load(tmp_path / "run" / "config.yaml").experiment)
    assert {d: (len(s.train), len(s.test)) for d, s in splits.items()} == {
        d: (len(prepared.train[d]), len(prepared.held[d])) for d in "ab"
    }
    assert _prompts(unseen["u"]) == ["u1", "u2"]


def test_settings_survive_yaml(tmp_path):
    content = _settings(tmp_path, unseen={"u": ["x.jsonl"]}, max_train_examples={"a": 3}, seed=7)
    content["data"]["domains"]["b"] = {"train": ["b.jsonl"], "test": "a.jsonl"}
    experiment = build(content).experiment
    assert build(yaml.safe_load(as_yaml(experiment))).experiment.data == experiment.data


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"domains": {"a": 3, "b": "b.jsonl"}}, "data.domains.a = 3: expected a file, folder or Hub name"),
    "unknown split": ({"domains": {"a": {"trian": "x"}, "b": "b.jsonl"}}, "or train, validation, test"),
    "unseen without a source": ({"unseen": {"u": None}}, "data.unseen.u = None: expected a file"),
    "unseen that is a domain": ({"unseen": {"a": "x.jsonl"}}, "data.unseen: a is a domain too"),
    "unseen that is a path": ({"unseen": {"../u": "x.jsonl"}}, "no name for a domain"),
    "words for a number": ({"max_train_examples": "many"}, "expected a whole number, or one for each domain"),
    "none to train on": ({"max_train_examples": 0}, "data.max_train_examples = 0: expected at least 1"),
    "none of one domain": ({"max_test_examples": {"a": 0}}, "data.max_test_examples.a = 0: expected at least 1"),
    "limit of nothing": ({"max_train_examples": {"aa": 2}}, "data.max_train_examples.aa: no such domain"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_settings_are_one_problem_each(mistake, tmp_path):
    change, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        build(_settings(tmp_path, **change))
    assert str(caught.value).startswith("1 problem ")
    assert message in str(caught.value)


def test_validate_knows_root_and_unseen(tmp_path):
    content = _settings(tmp_path / "root", root=None, unseen={"u": "u.jsonl"})
    _file(tmp_path / "root" / "u.jsonl", "u1 u2")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**content, "method": "full"}))
    result = CliRunner().invoke(app, ["validate", str(config), f"data={tmp_path / 'root'}", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["examples"]["u"] == {"train": 0, "test": 2}


def test_the_choice_depends_on_seed_and_domain_alone(tmp_path):
    names = [f"n{i}" for i in range(30)]
    one = _file(tmp_path / "one.jsonl", " ".join(names))
    shuffled = list(names)
    random.Random("4 d").shuffle(shuffled)
    split = read_domains({"d": one, "e": one}, seed=4, max_train_examples=5)["d"]
    assert [r.prompt for r in split.test + split.train] == shuffled[:8]
    alone = read_domains({"d": one}, seed=4, max_train_examples=5)["d"]
    assert alone == split
