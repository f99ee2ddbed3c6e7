"""What should a router read? Stage 2 of a finished demo run again, once for each way, and measured.

    loramix demo --out runs/demo
    python benchmarks/label_leak.py runs/demo [--json]

For each of reads = base | experts and pooling = last | mean: router accuracy while the label's expert is active (what a
training log shows) beside the accuracy when nobody knows the label (what counts). If the first is high and the second
is not, the routers have learned to recognise the active expert instead of the domain.
docs/decisions/0003-what-the-router-reads.md holds the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from loramix.cli.output import quiet_libraries

WAYS = [("base", "last"), ("base", "mean"), ("experts", "last"), ("experts", "mean")]


def taught_accuracy(prepared: Any, model: Any) -> float:
    """Share of held-out prompts that the last router gets right while the label's expert is active."""
    from loramix.evaluation.routing import RoutingRecord
    from loramix.evaluation.scoring import score

    everything = [example for examples in prepared.held.values() for example in examples]
    labels = [example.domain_id for example in everything]
    record = RoutingRecord(len(everything))
    score(model, everything, pad_token_id=prepared.pad, experts=labels, seen=record)
    return sum(int(a == b) for a, b in zip(record.last_N.tolist(), labels, strict=True)) / len(labels)


def measure(prepared: Any, experts: Any, reads: str, pooling: str) -> dict[str, Any]:
    """Trains stage 2 one way and measures it."""
    from loramix.building import train_method
    from loramix.evaluation.evaluate import measure_routed, rows_of

    adapter = prepared.experiment.adapter.model_copy(update={"router": {"reads": reads, "pooling": pooling}})
    prepared.experiment = prepared.experiment.model_copy(update={"adapter": adapter})
    model, _ = train_method(prepared, experts)
    result = measure_routed(model, prepared.held, pad_token_id=prepared.pad)
    row: dict[str, Any] = {"reads": reads, "pooling": pooling, **result.routers.overall}
    for decision in ("oracle", "last", "vote", "per_layer"):
        rows = rows_of(decision, result.by_decision[decision])
        row[f"perplexity_{decision}"] = sum(r.perplexity for r in rows) / len(rows)
    if reads == "experts":
        row["last_while_label_active"] = taught_accuracy(prepared, model)
    prepared.base = model.unload()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished demo run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet_libraries()
    from rich.console import Console

    from loramix.experiment import load
    from loramix.opening import load_experts
    from loramix.preparation import prepare
    from loramix.run_folder import RunFolder

    run = RunFolder.opened(arguments.run)
    prepared = prepare(load(run.config).experiment, Console(stderr=True), new=False)
    experts = load_experts(prepared)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepared.run = RunFolder(Path(folder))
        for reads, pooling in WAYS:
            rows.append(measure(prepared, experts, reads, pooling))
            print(json.dumps(rows[-1]), flush=True, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
