"""Domains without labels: clusters of what the base makes of prompts, named and written as a labelled data set.

Only prompts are read, never responses, so a prompt that nobody has answered yet can be placed in the same way; and the
clusters are fitted to the rows that will be learned, so those held out for measuring have no say in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loramix.data.records import Record
from loramix.errors import ConfigError, Problems
from loramix.lifecycle.cluster_names import names_of, salient_words
from loramix.lifecycle.clustering import Clusters, cluster, problems_of
from loramix.lifecycle.discover_agreement import agreement
from loramix.lifecycle.discover_data import (
    REPORT,
    TEST,
    TRAIN,
    Found,
    as_row,
    covered,
    output_problems,
    question,
    read_rows,
    write_rows,
)
from loramix.lifecycle.embedding import Vectors, checked_layer, depth, opening_ids, prompt_ids, prompt_states
from loramix.models import BUILTIN, load_base, load_tokenizer
from loramix.models.base import DTYPES
from loramix.run_folder import write_json

_EXAMPLES = 3
_SHOWN = 200


def discover(
    data: Sequence[str],
    output_dir: str | Path,
    *,
    test: Sequence[str] = (),
    base: str = BUILTIN,
    dtype: str = "float32",
    layer: int | None = None,
    k: int | None = None,
    max_k: int = 12,
    max_rows: int | None = None,
    max_length: int = 512,
    label_column: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Finds domains in rows without labels, writes the rows labelled, and returns the content of discovered.json.

    The same input and seed give the same files, byte for byte, on the same machine.

    Args:
        data, test, label_column, test_fraction: what is read and held out; see `read_rows`.
        output_dir: gets train.jsonl, test.jsonl and discovered.json.
        base, dtype: the model that reads the prompts.
        layer: whose states are averaged; by default the middle one.
        k, max_k, max_rows: how many clusters, and how many rows they are fitted to; see `cluster`.
        max_length: tokens of a prompt that are read at most.
        seed: of what is held out, of the rows fitted to and of k-means.
        console: where progress is shown.

    Raises:
        ConfigError, DataError, ModelError: what is wrong; nothing is written then.
    """
    console = console or Console(quiet=True)
    folder = Path(output_dir)
    _check(folder, dtype, max_length, test_fraction, problems_of(k, max_k, max_rows))
    rows = read_rows(data, test, label_column=label_column, test_fraction=test_fraction, seed=seed)
    records = [*rows.train, *rows.test]
    vectors_NH, layer = _embedded(records, base, dtype, layer, max_length, console)
    console.print(f"clustering {len(rows.train)} rows ...", highlight=False)
    clusters = cluster(vectors_NH, fit_rows=len(rows.train), k=k, max_k=max_k, max_rows=max_rows, seed=seed)
    ids = clusters.of.tolist()
    words = salient_words([record.prompt for record in rows.train], ids[: len(rows.train)], clusters.k)
    names = names_of(words)
    found = [Found(record, names[one]) for record, one in zip(records, ids, strict=True)]
    learned, measured = covered(found[: len(rows.train)], found[len(rows.train) :])
    agreed = agreement([one.domain for one in found], [record.domain for record in records])
    report = {
        "base": base,
        "layer": layer,
        "max_length": max_length,
        "seed": seed,
        "data": list(data),
        "test": list(test),
        "k": clusters.k,
        "k_given": k is not None,
        "silhouette": {str(number): value for number, value in clusters.silhouettes.items()},
        "k_left_out": list(clusters.unfit),
        "rows": {"train": len(learned), "test": len(measured), "fitted": clusters.fitted},
        "moved_to_test": len(rows.train) - len(learned),
        "clusters": _described(names, words, learned, measured, _typical(records, clusters, len(rows.train))),
        "agreement": None if agreed is None else asdict(agreed),
    }
    _write(folder, learned, measured, report)
    return report


def _check(folder: Path, dtype: str, max_length: int, test_fraction: float, others: Sequence[str]) -> None:
    """Raises a ConfigError with all that is wrong with the options, before anything is read."""
    problems = Problems("the options")
    problems.messages += [*output_problems(folder), *others]
    if dtype not in DTYPES:
        problems.add(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    if max_length < 1:
        problems.add(f"--max-length {max_length}: expected at least 1 token.")
    if not 0 < test_fraction < 1:
        problems.add(f"--test-fraction {test_fraction:g}: expected more than 0 and less than 1.")
    problems.raise_as(ConfigError)


def _embedded(
    records: Sequence[Record], base: str, dtype: str, layer: int | None, max_length: int, console: Console
) -> tuple[Vectors, int]:
    """Returns the records' vectors (N, H) and the layer they are from."""
    tokenizer = load_tokenizer(base)
    prompts = prompt_ids(tokenizer, records, max_length)
    model = load_base(base, dtype=dtype)
    layer = checked_layer(layer, depth(model))
    if torch.cuda.is_available():
        model.to("cuda")
    distinct, tokens = len(set(prompts)), sum(map(len, set(prompts)))
    doing = f"reading {distinct} prompts ({tokens} tokens) up to layer {layer} of {depth(model)}"
    console.print(f"{doing} ...", highlight=False)
    with console.status(doing) as status:
        vectors_NH = prompt_states(
            model,
            prompts,
            layer=layer,
            opening=opening_ids(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            done=lambda count: status.update(f"{doing}: {count} done"),
        )
    return vectors_NH, layer


def _typical(records: Sequence[Record], clusters: Clusters, fit_rows: int) -> list[list[str]]:
    """Returns for each cluster prompts nearest to its centre, among the rows it was fitted to and their like."""
    of, distances = clusters.of[:fit_rows].tolist(), clusters.distances[:fit_rows].tolist()
    order = sorted(range(fit_rows), key=lambda row: (round(distances[row], 6), row))
    found: list[dict[str, str]] = [{} for _ in range(clusters.k)]
    for row in order:
        own = found[of[row]]
        if len(own) < _EXAMPLES:
            flat = " ".join(records[row].prompt.split())
            own.setdefault(question(records[row]), flat if len(flat) <= _SHOWN else flat[: _SHOWN - 1] + "…")
    return [list(own.values()) for own in found]


def _described(
    names: Sequence[str],
    words: Sequence[Sequence[str]],
    learned: Sequence[Found],
    measured: Sequence[Found],
    examples: Sequence[Sequence[str]],
) -> list[dict[str, Any]]:
    train, test = (Counter(one.domain for one in part) for part in (learned, measured))
    return [
        {
            "name": name,
            "rows": train[name] + test[name],
            "train": train[name],
            "test": test[name],
            "words": list(telling),
            "examples": list(shown),
        }
        for name, telling, shown in zip(names, words, examples, strict=True)
    ]


def _write(folder: Path, learned: Sequence[Found], measured: Sequence[Found], report: dict[str, Any]) -> None:
    """Writes the three files, the report last: where it is, the others are whole."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / TRAIN, map(as_row, learned))
        write_rows(folder / TEST, map(as_row, measured))
        write_json(folder / REPORT, report)
    except OSError as error:
        raise ConfigError(
            f"--output-dir {folder}: cannot be written ({error.strerror}). Name another folder."
        ) from error
