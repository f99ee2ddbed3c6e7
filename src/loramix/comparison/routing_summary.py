"""What routers did, pooled over seeds, and the classifier they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from loramix.comparison.plan import Plan
from loramix.comparison.runner import CellRunner
from loramix.comparison.settings import Comparison
from loramix.corpus import Encoded
from loramix.data.classify import TF_IDF, fit
from loramix.methods import METHODS


def routing_of(cells: Mapping[int, Mapping[str | None, Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns accuracies (means over seeds), confusions and calibration (all seeds together) of a row's routers."""
    found = [by_domain[None]["routers"] for by_domain in cells.values() if None in by_domain]
    first = found[0]
    return {
        "prompts": sum(one["prompts"] for one in found),
        "decision": first["decision"],
        "decisions": {
            decision: {
                "accuracy": mean(one["overall"][decision] for one in found),
                "by_domain": {d: mean(one["by_domain"][d][decision] for one in found) for d in first["by_domain"]},
                "confusion": _added([one["confusion"][decision] for one in found if decision in one["confusion"]]),
            }
            for decision in first["overall"]
        },
        "by_layer": {layer: mean(one["by_layer"][layer] for one in found) for layer in first["by_layer"]},
        "calibration": _calibration([one["calibration"] for one in found]),
    }


def _added(confusions: Sequence[list[list[int]]]) -> list[list[int]] | None:
    if not confusions:
        return None
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*confusions, strict=True)]


def _calibration(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the calibration of all seeds' prompts together."""
    bins: dict[float, dict[str, Any]] = {}
    for part in parts:
        for one in part["bins"]:
            have = bins.setdefault(one["low"], {**one, "count": 0, "confidence": 0.0, "accuracy": 0.0})
            count = have["count"] + one["count"]
            for name in ("confidence", "accuracy"):
                have[name] = (have[name] * have["count"] + one[name] * one["count"]) / count
            have["count"] = count
    prompts = sum(one["count"] for one in bins.values())
    ece = sum(one["count"] * abs(one["confidence"] - one["accuracy"]) for one in bins.values()) / max(prompts, 1)
    return {"ece": ece, "bins": [bins[low] for low in sorted(bins)]}


def use_of(measured: Mapping[str, Any] | None, method: str) -> dict[str, Any] | None:
    """Returns a row's expert use, layers and experts named as short as they can be.

    Args:
        measured: of its cell of all domains.
        method: the row's.
    """
    use = (measured or {}).get("expert_use")
    if use is None or not use["layers"]:
        return None
    domains = list(use["by_domain"])
    widest = max(len(layer) for shares in use["by_domain"].values() for layer in shares)
    named = widest == len(domains) and METHODS[method].expert_count == "one per domain"
    shared = _common(use["layers"])
    return {
        "layers": [name.removeprefix(shared) for name in use["layers"]],
        "experts": domains if named else [str(number) for number in range(widest)],
        "by_domain": use["by_domain"],
    }


def _common(names: Sequence[str]) -> str:
    """Returns what all dotted names begin with."""
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared) if len(names) > 1 else ""


def classifier_baseline(comparison: Comparison, planned: Plan, runner: CellRunner) -> dict[str, Any]:
    """Returns how often a text classifier fitted to the training prompts names the domain of held-out prompts, beside
    routers that were taught the same."""
    kind = comparison.shared.measure.classifier
    routed = [
        cell
        for cell in planned.cells.values()
        if cell.kind == "method" and METHODS[cell.experiment.method].settled_by == "prompt"
    ]
    if kind is None or not routed:
        return {}
    data = runner.encoded(routed[0].experiment)
    name = "TF-IDF + logistic regression" if kind == TF_IDF else "sentence embedding + logistic regression"
    return {name: _classified(kind, data)}


def _classified(kind: str, data: Encoded) -> dict[str, Any]:
    domains = list(data.train)
    known = [(e.record.prompt, e.domain_id) for part in data.train.values() for e in part if e.record is not None]
    asked = [(e.record.prompt, e.domain_id) for part in data.held.values() for e in part if e.record is not None]
    classify = fit(kind, [prompt for prompt, _ in known], [label for _, label in known])
    confusion = [[0] * len(domains) for _ in domains]
    for (_, label), chosen in zip(asked, classify([prompt for prompt, _ in asked]), strict=True):
        confusion[label][chosen] += 1
    right = {domain: confusion[i][i] / max(sum(confusion[i]), 1) for i, domain in enumerate(domains)}
    return {
        "prompts": len(asked),
        "accuracy": sum(confusion[i][i] for i in range(len(domains))) / len(asked),
        "by_domain": right,
        "confusion": confusion,
    }
