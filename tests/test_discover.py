"""Domains without labels: prompts become vectors, vectors clusters, clusters named domains in files loramix reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from loramix import ConfigError, DataError
from loramix.cli import discover as verb
from loramix.cli.main import run
from loramix.data.domains import name_problem, read_domains
from loramix.data.reading import read_file
from loramix.data.records import Message, Record
from loramix.errors import Problems
from loramix.lifecycle.cluster_names import names_of, salient_words
from loramix.lifecycle.clustering import cluster
from loramix.lifecycle.discover import discover
from loramix.lifecycle.discover_agreement import agreement
from loramix.lifecycle.discover_data import Found, as_row, covered, question, read_rows
from loramix.lifecycle.embedding import opening_ids, prompt_ids, prompt_states
from tests import tiny

ROOT = Path(__file__).parent.parent


def _record(prompt: str, domain: str | None = None, response: str = "yes") -> Record:
    return Record((Message("user", prompt), Message("assistant", response)), domain, f"made:{prompt}")


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Vectors


def test_a_vector_is_the_mean_state_of_the_prompts_own_tokens():
    tokenizer = tiny.tokenizer()
    model = tiny.llama(vocab=len(tokenizer), layers=4)
    records = [_record("abc"), _record("a much longer prompt than the others"), _record("abc", response="no")]
    prompts, opening = prompt_ids(tokenizer, records, 512), opening_ids(tokenizer)
    assert tokenizer.decode(opening) == "<|im_start|>user\n"
    vectors = prompt_states(model, prompts, layer=2, opening=opening, pad_token_id=tiny.PAD)
    assert vectors.shape == (3, 32)
    assert (vectors[0] == vectors[2]).all()  # a response has no say
    for prompt, vector in zip(prompts, vectors, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0]
        assert vector == pytest.approx(states[len(opening) :].mean(dim=0).numpy(), abs=1e-5)


def test_prompts_are_cut_and_batches_do_not_matter():
    tokenizer = tiny.tokenizer()
    model = tiny.llama(vocab=len(tokenizer), layers=2)
    records = [_record("word " * n) for n in range(1, 9)]
    prompts = prompt_ids(tokenizer, records, 40)
    assert max(map(len, prompts)) == 40
    how = {"layer": 1, "opening": opening_ids(tokenizer), "pad_token_id": tiny.PAD}
    alone = prompt_states(model, prompts, tokens_per_batch=1, **how)
    assert prompt_states(model, prompts, tokens_per_batch=400, **how) == pytest.approx(alone, abs=1e-5)


def test_other_architectures_are_read_too():
    model = tiny.gpt2()
    prompts = [(5, 6, 7), (8, 9)]
    vectors = prompt_states(model, prompts, layer=1, opening=(), pad_token_id=0)
    with torch.no_grad():
        states = model(torch.tensor([prompts[1]]), output_hidden_states=True).hidden_states[1][0]
    assert vectors[1] == pytest.approx(states.mean(dim=0).numpy(), abs=1e-5)


# Clusters


def _blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, list[int]]:
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(len(sizes), 16)) * 5
    parts = [centre + draw.normal(size=(size, 16)) for centre, size in zip(centres, sizes, strict=True)]
    return np.concatenate(parts), [n for n, size in enumerate(sizes) for _ in range(size)]


def test_the_number_of_clusters_is_found_and_the_largest_is_first():
    vectors, labels = _blobs([20, 50, 30])
    clusters = cluster(vectors, max_k=6)
    assert clusters.k == 3
    assert set(clusters.silhouettes) == {2, 3, 4, 5, 6}
    assert max(clusters.silhouettes, key=clusters.silhouettes.get) == 3
    assert np.bincount(clusters.of).tolist() == [50, 30, 20]
    assert len(set(zip(labels, clusters.of.tolist(), strict=True))) == 3
    assert cluster(vectors, k=5).k == 5


def test_one_large_dimension_does_not_decide():
    vectors, labels = _blobs([30, 30])
    vectors[:, 0] = np.random.default_rng(1).normal(size=60) * 1000 + 5000
    found = cluster(vectors, max_k=4)
    assert found.k == 2
    assert len(set(zip(labels, found.of.tolist(), strict=True))) == 2


def test_rows_that_are_not_fitted_join_the_nearest():
    vectors, labels = _blobs([40, 40, 40])
    order = np.random.default_rng(0).permutation(120)
    shuffled = vectors[order]
    clusters = cluster(shuffled, fit_rows=90, max_rows=30)
    assert clusters.fitted == 30
    pairs = {(labels[row], one) for row, one in zip(order, clusters.of.tolist(), strict=True)}
    assert len(pairs) == clusters.k == 3
    again = cluster(np.concatenate([shuffled[:90], shuffled[90:] * 1.01]), fit_rows=90, max_rows=30)
    assert (again.of[:90] == clusters.of[:90]).all()  # rows that are not fitted have no say


def test_a_lone_row_is_no_cluster():
    vectors, _ = _blobs([20, 20])
    vectors = np.concatenate([vectors, -40 * np.ones((1, 16))])
    found = cluster(vectors, max_k=4)
    assert min(np.bincount(found.of)) >= 2
    with pytest.raises(DataError, match="--k 8: leaves a cluster with one distinct prompt"):
        cluster(np.concatenate([vectors[:3] + n for n in (0, 50)] * 2 + [vectors]), k=8)
    with pytest.raises(DataError, match="3 distinct prompts to cluster"):
        cluster(np.repeat(vectors[:3], 5, axis=0))


# Names


def test_clusters_are_named_by_their_words_in_english_and_chinese():
    prompts = ["What is the dividend of a bond?", "Is a bond safe?", "Should I sell the bond for its dividend?"]
    prompts += ["下列关于细胞的说法正确的是", "动物细胞和植物细胞的区别是什么", "细胞膜有什么作用"]
    words = salient_words(prompts, [0, 0, 0, 1, 1, 1], 2)
    assert words[0][:2] == ["bond", "dividend"]
    assert words[1][0] == "细胞"
    assert not {"what", "the", "is", "是什", "的说"} & {*words[0], *words[1]}
    names = names_of(words)
    assert names[0] == "bond-dividend"
    assert names[1].startswith("细胞")
    assert all(name_problem(name) is None for name in names)


def test_names_are_valid_and_distinct_whatever_the_words():
    same = [["bond", "tax"], ["bond", "tax"], ["bond", "tax", "loan"], ["bond", "tax"], [], [], ["x" * 300]]
    names = names_of(same)
    assert names[:3] == ["bond-tax", "bond-tax-2", "bond-tax-loan"]
    assert names[4:6] == ["cluster-5", "cluster-6"]
    assert len(set(names)) == len(same)
    assert all(name_problem(name) is None for name in names)
    assert salient_words(["1 + 2", "3 + 4", "!!", ""], [0, 0, 1, 1], 2) == [[], []]


# Agreement


def test_agreement_with_labels():
    same = agreement(["a", "a", "b", "b"], ["x", "x", "y", "y"])
    assert (same.purity, same.normalised_mutual_information, same.adjusted_rand_index) == (1, 1, 1)
    mixed = agreement(["a", "a", "a", "b", "b"], ["x", "x", "y", "y", None])
    assert (mixed.rows, mixed.labels, mixed.purity) == (4, 2, 0.75)
    assert mixed.table == {"a": {"x": 2, "y": 1}, "b": {"y": 1}}
    assert agreement(["a", "b"], [None, None]) is None


# Rows


def test_whole_questions_are_held_out(tmp_path):
    rows = [{"prompt": f"Question {n // 3}", "completion": f"answer {n}"} for n in range(60)]
    halves = [_write(tmp_path / "a.jsonl", rows[::2]), _write(tmp_path / "b.jsonl", rows[1::2])]
    read = read_rows(halves, test_fraction=0.2)
    assert len(read.train) + len(read.test) == 60
    assert 12 <= len(read.test) <= 14
    assert not set(map(question, read.train)) & set(map(question, read.test))


def test_test_parts_test_files_and_labels(tmp_path):
    toys = tiny.toy_domains(tmp_path, train=6, test=3)
    read = read_rows([toys["adds"], f"loud={toys['shouts']}"])
    assert (len(read.train), len(read.test)) == (12, 6)
    assert Counter(row.domain for row in read.train) == {None: 6, "loud": 6}
    tests = [f"{toys['adds']}/test.jsonl", toys["shouts"]]
    read = read_rows([toys["adds"]], tests)
    assert (len(read.train), len(read.test)) == (6, 6)
    rows = [{"prompt": f"p{n}", "completion": "c", "topic": "t", "task": "other"} for n in range(10)]
    named = _write(tmp_path / "a=b.jsonl", rows)
    assert {row.domain for row in read_rows([named]).train} == {"other"}
    assert {row.domain for row in read_rows([named], [named], label_column="topic").test} == {"t"}
    with pytest.raises(DataError) as told:
        read_rows([str(tmp_path / "none.jsonl"), toys["adds"]], label_column="topic")
    assert "none.jsonl: no such file" in str(told.value)
    assert 'has no "topic"' in str(told.value)


def test_every_domain_gets_rows_to_measure():
    learned = [Found(_record(f"{n % 4}", "xy"[n % 2]), "a" if n < 6 else "b") for n in range(12)]
    train, test = covered(learned, [])
    assert {one.domain for one in train} == {one.domain for one in test} == {"a", "b"}
    assert {one.record.domain for one in train} == {one.record.domain for one in test} == {"x", "y"}
    assert len(train) + len(test) == 12
    assert not {question(one.record) for one in train} & {question(one.record) for one in test}
    unique = [Found(_record(f"{n}", f"id {n}"), "ab"[n % 2]) for n in range(8)]
    train, test = covered(unique, [Found(_record("other"), "a")])
    assert (len(train), len(test)) == (7, 2)  # labels of one row stay where they are, but "b" is to be measured
    assert [one.domain for one in test] == ["a", "b"]
    with pytest.raises(DataError, match="'a' asks one question only"):
        covered([Found(_record("same"), "a")] * 3, [])


def test_rows_are_written_as_they_were_read(tmp_path):
    rows = [
        {"prompt": "p", "completion": "c"},
        {"system": "s", "prompt": "p", "completion": "c"},
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b")) * 2]},
        {"question": "Which?", "context": "A text.", "choices": ["one", "two"], "answer": "B"},
        {"prompt": "call", "completion": "f()", "tools": [{"name": "f"}]},
        {"instruction": "Übersetze", "input": "你好", "output": "hello"},
    ]
    problems = Problems("test")
    before = read_file(Path(_write(tmp_path / "a.jsonl", rows)), problems, domain="true")
    written = _write(tmp_path / "b.jsonl", [as_row(Found(record, "new")) for record in before])
    for column, label in ((None, "new"), ("true_domain", "true")):
        after = read_file(Path(written), problems, domain=None, domain_column=column)
        assert not problems.messages
        for one, other in zip(after, before, strict=True):
            same = ("messages", "tools", "choices")
            assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
            assert one.domain == label


# The whole of it


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three toy domains in one file with a column, and one file without."""
    folder = tmp_path_factory.mktemp("discover")
    tiny.save_base(folder / "base")
    words = {
        "fruit": ["apple", "pear", "plum"],
        "SHIPS": ["VESSEL", "HARBOUR", "ANCHOR"],
        "数": ["细胞", "动物", "植物"],
    }
    rows = []
    for number in range(30):
        for label, own in words.items():
            said = " ".join(own[(number + shift) % 3] for shift in range(1 + number % 5)) + own[0] * (number % 7)
            rows.append({"prompt": f"{said} {number}", "completion": own[0], "domain": label})
    _write(folder / "labelled.jsonl", rows)
    _write(folder / "bare.jsonl", [{k: v for k, v in row.items() if k != "domain"} for row in rows])
    return folder


def test_discovered_data_can_be_used_at_once(ground: Path, tmp_path: Path):
    report = discover([str(ground / "labelled.jsonl")], tmp_path / "out", base=str(ground / "base"), max_k=5)
    assert report["k"] == 3
    assert report["layer"] == 2
    assert report["agreement"]["purity"] == 1
    assert {tuple(row) for row in report["agreement"]["table"].values()} == {("fruit",), ("SHIPS",), ("数",)}
    assert json.loads((tmp_path / "out" / "discovered.json").read_text()) == report
    found = read_domains({}, labelled=str(tmp_path / "out"))
    true = read_domains({}, labelled=str(tmp_path / "out"), domain_column="true_domain")
    assert set(found) == {one["name"] for one in report["clusters"]}
    assert set(true) == {"fruit", "SHIPS", "数"}
    for split in ("train", "test"):
        texts = [
            sorted((row.prompt, row.response) for one in splits.values() for row in getattr(one, split))
            for splits in (found, true)
        ]
        assert texts[0] == texts[1]
        assert all(getattr(one, split) for one in found.values())
    for one in report["clusters"]:
        assert len(one["examples"]) == 3
        assert one["train"] == len(found[one["name"]].train)


def test_same_input_same_bytes(ground: Path, tmp_path: Path):
    for name in ("one", "two"):
        given = {"base": str(ground / "base"), "max_k": 4, "max_rows": 40, "seed": 3}
        discover([str(ground / "labelled.jsonl")], tmp_path / name, **given)
    for file in ("train.jsonl", "test.jsonl", "discovered.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_labels_have_no_say(ground: Path, tmp_path: Path):
    for name in ("labelled", "bare"):
        discover([str(ground / f"{name}.jsonl")], tmp_path / name, base=str(ground / "base"), max_k=5)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("labelled", "bare")
    ]
    assert [(row["prompt"], row["domain"]) for row in rows[0]] == [(row["prompt"], row["domain"]) for row in rows[1]]
    assert not any("true_domain" in row for row in rows[1])
    assert json.loads((tmp_path / "bare" / "discovered.json").read_text())["agreement"] is None


def test_wrong_options_are_told_together(ground: Path, tmp_path: Path):
    _write(tmp_path / "test.jsonl", [])
    with pytest.raises(ConfigError) as told:
        discover(["x.jsonl"], tmp_path, k=1, max_k=1, max_rows=2, dtype="int3", max_length=0, test_fraction=2)
    message = str(told.value)
    for said in ("holds test.jsonl already", "--k 1", "--max-k 1", "--max-rows 2", "'int3'", "--max-length 0", "2:"):
        assert said in message
    with pytest.raises(ConfigError, match="--layer 9: the base has layers 1 to 4"):
        discover([str(ground / "bare.jsonl")], tmp_path / "out", base=str(ground / "base"), layer=9)
    assert not (tmp_path / "out").exists()


def test_the_verb_prints_what_was_found_and_the_recipe_trains_on_it(ground: Path, tmp_path: Path, capsys):
    app = typer.Typer()
    verb.add_to(app)
    app.callback()(lambda: None)
    given = ["discover", "-d", str(ground / "labelled.jsonl"), "-o", str(tmp_path / "out"), "--k", "3"]
    result = CliRunner().invoke(app, [*given, "--base", str(ground / "base")])
    assert result.exit_code == 0, result.output
    for said in (
        "3 clusters (as given)",
        "fruit, 100.0%",
        "purity 100.0%",
        "loramix train recipes/discovered/moa.yaml",
    ):
        assert said in result.stdout
    settings = yaml.safe_load((ROOT / "recipes" / "discovered" / "moa.yaml").read_text())
    assert settings["method"] == "moa"
    overrides = [f"data.path={tmp_path / 'out'}", f"model_name_or_path={ground / 'base'}", "max_steps=2", "controls=[]"]
    recipe = str(ROOT / "recipes" / "discovered" / "moa.yaml")
    assert run(["train", recipe, *overrides, f"output_dir={tmp_path / 'run'}", "--json"]) == 0
    report = json.loads((tmp_path / "out" / "discovered.json").read_text())
    results = json.loads(capsys.readouterr().out)
    assert set(results["domains"]) == {one["name"] for one in report["clusters"]}


def test_discovered_labels_stand_beside_true_ones_in_one_comparison(ground: Path, tmp_path: Path):
    found = tmp_path / "found"
    discover([str(ground / "labelled.jsonl")], found, base=str(ground / "base"), k=2)
    recipe = str(ROOT / "recipes" / "discovered" / "compare.yaml")
    overrides = [f"data.path={found}", f"model_name_or_path={ground / 'base'}", "max_steps=2", "adapter.r=2"]
    out = tmp_path / "out"
    assert run(["compare", recipe, *overrides, f"output_dir={out}", f"cells={tmp_path / 'cells'}", "--json"]) == 0
    results = json.loads((out / "comparison.json").read_text())
    scores = {row["id"]: row["scores"]["perplexity"] for row in results["rows"]}
    assert scores["moa/mixture"]["by_domain"].keys().isdisjoint(scores["moa, true labels/mixture"]["by_domain"])
    assert all(one["average"] is None for one in scores.values()), "no domain is shared, so no mean over domains"
    measured = json.loads(next((tmp_path / "cells").rglob("base-*/measured-*.json")).read_text())
    parts = [part["perplexity"]["stats"] for part in measured["routings"][""].values()]
    nll, tokens = (sum(row[column] for stats in parts for row in stats) for column in (0, 1))
    assert scores["base"]["pooled"]["mean"] == pytest.approx(math.exp(nll / tokens))
    assert all(one["pooled"]["low"] <= one["pooled"]["mean"] <= one["pooled"]["high"] for one in scores.values())
    table = (out / "tables.md").read_text().split("## Perplexity")[1].split("##")[0]
    assert "all examples" in table
    assert f"{scores['base']['pooled']['mean']:.3f} [" in table
