"""From the cells of a comparison to its one results file. Nothing here runs a model or reads the clock."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from loramix.comparison.costs import cost_of
from loramix.comparison.curves import curves_of
from loramix.comparison.lines import Line, lines_of
from loramix.comparison.measuring import OWN
from loramix.comparison.plan import Plan
from loramix.comparison.routing_summary import classifier_baseline, routing_of, use_of
from loramix.comparison.runner import CellRunner
from loramix.comparison.settings import Comparison
from loramix.environment import environment
from loramix.evaluation.bootstrap import Draws, difference, interval, mean_over_domains
from loramix.evaluation.metrics import METRICS, value_of
from loramix.methods import METHODS
from loramix.reports.reading import FORMAT

TITLES = {"base": "the base", "lora-long": "LoRA, as long"}


def summarise(
    comparison: Comparison,
    planned: Plan,
    files: Mapping[str, Path],
    runner: CellRunner,
    judge_of: Callable[[Sequence[Line]], dict[str, Any] | None],
) -> dict[str, Any]:
    """Returns the content of comparison.json; see docs/compare.md.

    Args:
        comparison: what was asked for.
        planned: its cells and where they belong.
        files: cell -> where its measurements lie if it is finished.
        runner: gives the encoded data.
        judge_of: asks a judge about the answers, if there is one.
    """
    lines = lines_of(comparison, planned, files)
    domains, unseen, counts = _domains(planned, runner)
    draws = Draws(comparison.shared.measure.resamples)
    core = core_domains(lines, domains)
    everything = [*domains, *unseen]
    own = [line for line in lines if line.routing is None]
    rows = [_row(line, everything, core, draws, planned, files) for line in lines]
    return {
        "format": FORMAT,
        "title": comparison.shared.title,
        "config": comparison.resolved(),
        "environment": environment(),
        "domains": domains,
        "unseen": unseen,
        "data": counts,
        "overlap": overlap_of(planned, runner),
        "metrics": _metrics(lines, [*domains, *unseen]),
        "rows": rows,
        "paired": _paired(comparison, lines, everything, core, draws),
        "routing": {line.id: routing_of(line.cells) for line in own if _routed(line)},
        "classifier": classifier_baseline(comparison, planned, runner),
        "expert_use": {line.id: use for line in own if (use := use_of(line.first, line.method))},
        "similarity": {line.id: alike for line in own if (alike := _similarity(line))},
        "curves": curves_of(lines, planned, files),
        "examples": _examples(lines),
        "judge": judge_of(lines),
    }


def _domains(planned: Plan, runner: CellRunner) -> tuple[list[str], list[str], dict[str, Any]]:
    """Returns the domains of all rows in order of appearance, the unseen ones, and their counts."""
    counts: dict[str, Any] = {}
    domains: dict[str, None] = {}
    unseen: dict[str, None] = {}
    for cell in planned.cells.values():
        data = runner.encoded(cell.experiment)
        domains.update(dict.fromkeys(data.train))
        unseen.update(dict.fromkeys(data.unseen))
        counts = {**data.counts, **counts}
    return list(domains), [domain for domain in unseen if domain not in domains], counts


def overlap_of(planned: Plan, runner: CellRunner) -> list[dict[str, Any]]:
    """Returns the overlaps between parts of all data the rows use, each once."""
    found = [one for cell in planned.cells.values() for one in runner.encoded(cell.experiment).overlap]
    return list({json.dumps(one, sort_keys=True): one for one in found}.values())


def _metrics(lines: Sequence[Line], domains: Sequence[str]) -> dict[str, Any]:
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        for cells in line.cells.values():
            for measured in cells.values():
                for domain, parts in measured["routings"][OWN].items():
                    for metric, part in parts.items():
                        found.setdefault(metric, {}).setdefault(domain, part["signature"])
    return {
        metric: {
            "title": METRICS[metric].title,
            "better": METRICS[metric].better,
            "digits": METRICS[metric].digits,
            "signatures": {domain: found[metric][domain] for domain in domains if domain in found[metric]},
        }
        for metric in METRICS
        if metric in found
    }


def _row(
    line: Line,
    domains: Sequence[str],
    core: Sequence[str],
    draws: Draws,
    planned: Plan,
    files: Mapping[str, Path],
) -> dict[str, Any]:
    return {
        "id": line.id,
        "base": line.base,
        "label": line.label,
        "title": TITLES.get(line.method) or METHODS[line.method].title,
        "method": line.method,
        "setting": line.setting,
        "routing": line.routing,
        "seeds": sorted(line.cells),
        "scores": {
            metric: scores for metric in METRICS if (scores := _scores(line, metric, domains, core, draws))["by_domain"]
        },
        "cost": cost_of(line.entries, planned.cells, files),
    }


def _scores(line: Line, metric: str, domains: Sequence[str], core: Sequence[str], draws: Draws) -> dict[str, Any]:
    """Returns a row's scores by domain, and their mean over the core domains; no mean if a cell of these failed."""
    by_domain, values, by_seed = {}, {}, defaultdict(list)
    value = METRICS[metric].value
    failed = False
    for domain in domains:
        stats = line.stats(metric, domain)
        if not stats:
            failed = failed or (domain in core and domain not in line.measured)
            continue
        seeds = [value_of(metric, one) for one in stats.values()]
        values_R = draws.values(domain, list(stats.values()), value)
        by_domain[domain] = _spread(seeds, values_R)
        if domain in core:
            values[domain] = values_R
            for seed, one in zip(stats, seeds, strict=True):
                by_seed[seed].append(one)
    whole = [mean(parts) for parts in by_seed.values() if len(parts) == len(values)]
    complete = bool(whole) and len(whole) == len(by_seed) and not failed
    average = _spread(whole, mean_over_domains(values)) if complete else None
    pooled = _pooled(line, metric, draws)
    return {"by_domain": by_domain, "average": average, "domains": len(values), "pooled": pooled}


def _pooled(line: Line, metric: str, draws: Draws) -> dict[str, Any] | None:
    """Returns a row's score on the examples of all its domains put together: what rows can be compared by that give the
    same examples different labels. None if a domain is missing or measured in another way than the others."""
    found = [line.stats(metric, domain) for domain in line.asked]
    seeds = [seed for seed in line.cells if all(seed in stats for stats in found)]
    if not seeds or len(line.signatures(metric)) != 1:
        return None
    together = [[vector for stats in found for vector in stats[seed]] for seed in seeds]
    values_R = draws.values("all together", together, METRICS[metric].value)
    return _spread([value_of(metric, stats) for stats in together], values_R)


def _spread(by_seed: Sequence[float], values_R: Any) -> dict[str, Any]:
    return {
        "mean": mean(by_seed),
        "std": stdev(by_seed) if len(by_seed) > 1 else None,
        "by_seed": list(by_seed),
        **asdict(interval(values_R)),
    }


def _paired(
    comparison: Comparison, lines: Sequence[Line], domains: Sequence[str], core: Sequence[str], draws: Draws
) -> list[dict[str, Any]]:
    """Returns the tests of every row against one of the same base."""
    found = []
    for metric in METRICS:
        for base in dict.fromkeys(line.base for line in lines):
            same = [line for line in lines if line.base == base]
            reference = reference_of(comparison, same)
            for line in same:
                if reference is None or line is reference:
                    continue
                tested = _differences(line, reference, metric, domains, core, draws)
                if tested:
                    found.append({"metric": metric, "row": line.id, "against": reference.id, **tested})
    return found


def core_domains(lines: Sequence[Line], domains: Sequence[str]) -> list[str]:
    """Returns the domains that every row was to be measured on: means are over these."""
    return [domain for domain in domains if all(domain in line.asked for line in lines)]


def reference_of(comparison: Comparison, lines: Sequence[Line]) -> Line | None:
    """Returns the row that others (of one base) are tested against: as set, else the mixed LoRA, else the first
    mixture."""
    own = [line for line in lines if line.routing is None]
    if comparison.shared.against is not None:
        return next((line for line in own if line.row == comparison.shared.against), None)
    mixtures = [line for line in own if line.setting == "mixture"]
    return next((line for line in mixtures if line.method == "lora"), mixtures[0] if mixtures else None)


def _differences(
    line: Line, reference: Line, metric: str, domains: Sequence[str], core: Sequence[str], draws: Draws
) -> dict[str, Any] | None:
    """Returns the paired differences on the seeds both have, in the domains that both were measured on by the same
    examples."""
    value = METRICS[metric].value
    by_domain, firsts, seconds, observed = {}, {}, {}, []
    for domain in domains:
        first, second = line.stats(metric, domain), reference.stats(metric, domain)
        seeds = [seed for seed in first if seed in second]
        if not seeds or line.held[domain] != reference.held[domain]:
            continue
        ours, theirs = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
        first_R, second_R = draws.values(domain, ours, value), draws.values(domain, theirs, value)
        apart = mean(value_of(metric, s) for s in ours) - mean(value_of(metric, s) for s in theirs)
        by_domain[domain] = asdict(difference(apart, first_R, second_R))
        if domain in core:
            firsts[domain], seconds[domain] = first_R, second_R
            observed.append(apart)
    if not by_domain:
        return None
    complete = all(domain in firsts for domain in core if reference.stats(metric, domain)) and bool(firsts)
    average = None
    if complete:
        average = asdict(difference(float(np.mean(observed)), mean_over_domains(firsts), mean_over_domains(seconds)))
    return {"by_domain": by_domain, "average": average}


def _routed(line: Line) -> bool:
    return line.first is not None and line.first.get("routers") is not None


def _similarity(line: Line) -> dict[str, Any] | None:
    alike = (line.first or {}).get("similarity")
    if alike is None:
        return None
    count = len(alike["BA"])
    named = METHODS[line.method].expert_count == "one per domain" if line.method in METHODS else False
    use = (line.first or {}).get("expert_use")
    names = (
        list(use["by_domain"]) if named and use and len(use["by_domain"]) == count else [str(n) for n in range(count)]
    )
    return {"experts": names, **alike}


def _examples(lines: Sequence[Line], most: int = 1) -> list[dict[str, Any]]:
    """Returns the first answered prompts of each domain with what every row answered, of the first seed."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines:
        if line.routing is not None or not line.cells:
            continue
        for measured in line.cells[min(line.cells)].values():
            for domain, answered in measured["answers"].items():
                for one in answered[:most]:
                    about = {"domain": domain, "prompt": one["prompt"], "reference": one["reference"], "answers": {}}
                    found.setdefault((domain, one["prompt"]), about)["answers"][line.id] = one["answer"]
    return list(found.values())
