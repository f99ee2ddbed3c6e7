"""Reads finished comparisons and runs into one form, so that every table and figure has one source.

The form is the content of comparison.json (docs/compare.md), where a row's mean stands only if it is over as many
domains as the others'. A run of `loramix train` has less: one seed, perplexity alone, no intervals; what it lacks is
empty.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loramix.errors import ConfigError
from loramix.run_folder import RunFolder

FORMAT = "loramix comparison 1"
COMPARISON = "comparison.json"
ABSTENTION = "abstention.json"
"""What `loramix calibrate` writes into a run."""
Content = dict[str, Any]
_KEYS = (
    *("title", "config", "environment", "domains", "unseen", "data", "overlap", "metrics", "rows", "paired"),
    *("routing", "classifier", "expert_use", "similarity", "curves", "examples", "judge"),
)
# What results.json calls the rows of a run, and log.jsonl the stages in which they are trained.
_ROWS = {
    "base": ("base", "none", "the base"),
    "single": ("lora", "single", "LoRA"),
    "single_long": ("lora-long", "single", "LoRA, as long"),
    "mixed": ("lora", "mixture", "LoRA"),
}
_STAGES = {"expert": "lora/single", "experts": "lora/single", "longer": "lora-long/single", "mixed": "lora/mixture"}


def read(path: str | Path) -> Content:
    """Returns what a folder holds: a comparison, or a run.

    Raises:
        ConfigError: it holds neither, or one that this version cannot read.
    """
    folder = Path(path)
    if (folder / COMPARISON).is_file():
        content = _json(folder / COMPARISON)
        if content.get("format") != FORMAT:
            raise ConfigError(
                f"{folder / COMPARISON}: has the format {content.get('format')!r}, expected {FORMAT!r}. Write it again "
                "with `loramix compare` (finished cells are kept)."
            )
        _require(content, _KEYS, folder / COMPARISON, "loramix compare")
        return _comparable(content)
    if (folder / "results.json").is_file():
        return _of_run(folder)
    raise ConfigError(
        f"{folder}: no results here (neither {COMPARISON} nor results.json). Expected the output_dir of a finished "
        "`loramix compare` or `loramix train`."
    )


def _require(content: Content, keys: Iterable[str], file: Path, verb: str) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ConfigError(f"{file}: has no {', '.join(missing)}. It is not whole: write it again with `{verb}`.")


def _comparable(content: Content) -> Content:
    """Takes out means over fewer domains than other rows' (a cell failed, or a row has domains of its own): side by
    side they would compare domains, not methods."""
    for metric in content["metrics"]:
        found = [row["scores"][metric] for row in content["rows"] if metric in row["scores"]]
        most = max((scores.get("domains", 0) for scores in found), default=0)
        for scores in found:
            if scores.get("domains", most) < most:
                scores["average"] = None
    return content


def _json(file: Path) -> Content:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}). Write it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds {type(content).__name__}, expected an object. Write it again.")
    return content


def _of_run(folder: Path) -> Content:
    run = RunFolder(folder)
    results = _json(run.results)
    _require(results, ("method", "domains", "rows"), run.results, "loramix train")
    method = results["method"]
    by_model: dict[str, dict[str, float]] = defaultdict(dict)
    for row in results["rows"]:
        by_model[row["model"]][row["domain"]] = row["perplexity"]
    if not any(model.partition("_")[0] == method for model in by_model) and "mixed" in by_model:
        by_model[method] = by_model.pop("mixed")  # A method of one expert is its own mixed model.
    domains = results["domains"]
    data = _json(run.data) if run.data.is_file() else {}
    return {
        "format": FORMAT,
        "title": f"{method}: {folder.name}",
        "config": {},
        "environment": _json(run.environment) if run.environment.is_file() else {},
        "domains": domains,
        "unseen": [],
        "data": {domain: data[domain] for domain in domains if domain in data},
        "overlap": next((part for part in data.values() if isinstance(part, list)), []),
        "metrics": {"perplexity": {"title": "Perplexity", "better": "lower", "digits": 3, "signatures": {}}},
        "rows": [_row(model, found, domains) for model, found in by_model.items()],
        "paired": [],
        "routing": _routing(results),
        "classifier": {},
        "expert_use": {},
        "similarity": {},
        "curves": _curves(run.log, f"{method}/mixture"),
        "examples": _examples(results),
        "judge": None,
        **({"abstention": _json(folder / ABSTENTION)} if (folder / ABSTENTION).is_file() else {}),
    }


def _row(model: str, found: dict[str, float], domains: list[str]) -> Content:
    name, _, how = model.partition("_")
    label, setting, title = _ROWS.get(model, (name, "mixture", name))
    routing = "oracle" if how == "oracle" else None
    identity = "/".join(part for part in (label, setting if setting != "none" else None, routing) if part)
    whole = [found[domain] for domain in domains if domain in found]
    average = _spread(sum(whole) / len(whole)) if len(whole) == len(domains) else None
    scores = {"by_domain": {domain: _spread(value) for domain, value in found.items()}, "average": average}
    return {
        "id": identity,
        "base": "",
        "label": label,
        "title": title,
        "method": label,
        "setting": setting,
        "routing": routing,
        "seeds": [0],
        "scores": {"perplexity": scores},
        "cost": {},
    }


def _spread(value: float) -> Content:
    return {"mean": value, "std": None, "by_seed": [value], "low": None, "high": None}


def _routing(results: Content) -> Content:
    if "router_accuracy_overall" not in results:
        return {}
    decisions = {
        decision: {
            "accuracy": accuracy,
            "by_domain": {d: found[decision] for d, found in results["router_accuracy"].items()},
            "confusion": results["router_confusion"].get(decision),
        }
        for decision, accuracy in results["router_accuracy_overall"].items()
    }
    return {
        f"{results['method']}/mixture": {
            "prompts": results["router_prompts"],
            "decision": "last",
            "decisions": decisions,
            "by_layer": results["router_accuracy_by_layer"],
            "calibration": results.get("router_calibration"),
        }
    }


def _curves(log: Path, name: str) -> Content:
    """Returns row -> domain -> [[step, loss], ...] of a run's log; `name` is the row of the method's own stage."""
    curves: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    if log.is_file():
        for number, line in enumerate(log.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ConfigError(
                    f"{log}: line {number} cannot be read ({error}). Take it out and write the report again."
                ) from error
            kind, _, domain = entry["stage"].partition(" ")
            found = curves[_STAGES.get(kind, name)]
            for key, value in entry.items():
                if key.startswith("loss/") or (key == "loss" and not domain):
                    found[key.removeprefix("loss/") if key != "loss" else "all"].append([entry["step"], float(value)])
    return {row: dict(found) for row, found in curves.items()}


def _examples(results: Content) -> list[Content]:
    name = f"{results['method']}/mixture"
    return [
        {**{key: one[key] for key in ("domain", "prompt", "reference")}, "answers": {name: one["answer"]}}
        for one in results.get("examples", [])
    ]
