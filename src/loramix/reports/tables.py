"""The tables of a report as plain values. The same results give the same text, byte by byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramix.reports.reading import Content

NONE = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and whether it is the best of its kind."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The first column names the rows.

    Attributes:
        title: a heading.
        note: how to read it, one or two sentences; may be empty.
        heads: of the columns.
        rows: cells, as many in each as there are heads.
    """

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def name_of(row: Mapping[str, Any]) -> str:
    """Returns what a row is called in tables: its label, setting and routing."""
    words = [row["label"], *{"none": [], "mixture": ["mixed"]}.get(row["setting"], ["single"])]
    if row["routing"] is not None:
        words.append({"oracle": "label's expert", "extracted": "experts alone"}.get(row["routing"], row["routing"]))
    return ", ".join(words)


def quality(content: Content) -> list[Table]:
    """Returns a table for each metric: rows are methods, columns domains (as MoSLD's Table 1)."""
    return [_quality(content, metric) for metric in content["metrics"]]


def _quality(content: Content, metric: str) -> Table:
    about = content["metrics"][metric]
    rows = [row for row in content["rows"] if row["scores"].get(metric, {}).get("by_domain")]
    domains = [
        domain
        for domain in (*content["domains"], *content["unseen"])
        if any(domain in row["scores"][metric]["by_domain"] for row in rows)
    ]
    best = {domain: _best(rows, metric, domain, about["better"]) for domain in (*domains, None)}
    made = []
    for row in rows:
        scores = row["scores"][metric]
        cells = [Cell(name_of(row))]
        for domain in domains:
            value = scores["by_domain"].get(domain)
            cells.append(Cell(_spread(value, about["digits"]), row["id"] in best[domain]))
        cells.append(Cell(_interval(scores["average"], about["digits"]), row["id"] in best[None]))
        made.append(tuple(cells))
    way = "lower" if about["better"] == "lower" else "higher"
    note = f"{way.capitalize()} is better; the best of each column is bold, rows that know the label aside."
    seeds = max((len(row["seeds"]) for row in rows), default=1)
    note += f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else " One seed."
    note += " The mean over domains has the 95 % interval of a bootstrap over test examples in brackets."
    heads = ("", *(f"{d} (unseen)" if d in content["unseen"] else d for d in domains), "mean")
    return Table(about["title"], note, heads, tuple(made))


def _best(rows: Sequence[Mapping[str, Any]], metric: str, domain: str | None, better: str) -> set[str]:
    """Returns the ids of the best rows of a column; the bare base and rows told the label are out of competition."""
    values = {}
    for row in rows:
        scores = row["scores"][metric]
        value = scores["average"] if domain is None else scores["by_domain"].get(domain)
        if value is not None and row["routing"] is None and row["setting"] != "none":
            values[row["id"]] = value["mean"]
    if len(values) < 2:
        return set()
    if len(set(values.values())) < 2:
        return set()
    wanted = (min if better == "lower" else max)(values.values())
    return {name for name, value in values.items() if value == wanted}


def _spread(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return NONE
    text = f"{value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"


def _interval(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None or value.get("low") is None:
        return _spread(value, digits)
    return f"{_spread(value, digits)} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def as_in_moa(content: Content) -> Table | None:
    """Returns MoA's Tables 2 and 8 in their layout, domains as rows; None unless MoA and the single LoRA are there."""
    wanted = (
        ("lora/single", "single"),
        ("lora/mixture", "mixed"),
        ("lora-long/single", "single, as long"),
        ("moa/mixture", "MoA"),
        ("moa/mixture/oracle", "expert of MoA alone"),
        ("moe-lora/mixture", "MoE-LoRA"),
        ("moe-lora/mixture/extracted", "expert of MoE-LoRA alone"),
    )
    by_id = {row["id"]: row for row in content["rows"] if "perplexity" in row["scores"]}
    there = [(name, head) for name, head in wanted if name in by_id]
    if not {"lora/single", "moa/mixture"} <= {name for name, _ in there}:
        return None
    rows = []
    for domain in (*content["domains"], None):
        cells = [Cell("mean" if domain is None else domain)]
        for name, _ in there:
            scores = by_id[name]["scores"]["perplexity"]
            value = scores["average"] if domain is None else scores["by_domain"].get(domain)
            cells.append(Cell(_spread(value, 3)))
        rows.append(tuple(cells))
    note = (
        "The layout of MoA's Tables 2 and 8. An expert alone is the LoRA taken out of the mixture and used without any "
        "router; for MoA, whose experts never mix, that is the mixture with the label's expert."
    )
    return Table("As in the MoA paper: perplexity", note, ("domain", *(head for _, head in there)), tuple(rows))


def routers(content: Content) -> list[Table]:
    """Returns router accuracy by domain and decision beside a text classifier's (as MoA's Table 3), for each row."""
    return [_routers(content, name, found) for name, found in content["routing"].items()]


def _routers(content: Content, name: str, found: Mapping[str, Any]) -> Table:
    decisions = list(found["decisions"])
    baselines = content["classifier"]
    rows = []
    for domain in (*content["domains"], None):
        cells = [Cell("all prompts" if domain is None else domain)]
        for one in (*(found["decisions"][d] for d in decisions), *baselines.values()):
            value = one["accuracy"] if domain is None else one["by_domain"].get(domain)
            cells.append(Cell(NONE if value is None else f"{100 * value:.1f} %"))
        rows.append(tuple(cells))
    note = f"{found['prompts']} held-out prompts"
    if baselines:
        note += "; the classifier learned from the same training prompts and was asked about the same held-out ones"
    ece = (found.get("calibration") or {}).get("ece")
    note += f". Expected calibration error of the last router: {100 * ece:.1f} points." if ece is not None else "."
    return Table(f"Who is sent to the right expert: {name}", note, ("domain", *decisions, *baselines), tuple(rows))


def paired(content: Content) -> list[Table]:
    """Returns, for each metric, the differences of all rows from one, with their intervals."""
    tables = []
    for metric, about in content["metrics"].items():
        tests = [one for one in content["paired"] if one["metric"] == metric]
        if not tests:
            continue
        rows = []
        names = {row["id"]: name_of(row) for row in content["rows"]}
        for one in tests:
            average = one["average"]
            domains = one["by_domain"].values()
            down = about["better"] == "lower"
            surely = sum((d["high"] < 0) if down else (d["low"] > 0) for d in domains)
            worse = sum((d["low"] > 0) if down else (d["high"] < 0) for d in domains)
            rows.append(
                (
                    Cell(names[one["row"]]),
                    Cell(_signed(average, about["digits"])),
                    Cell(NONE if average is None else _p(average["p"])),
                    Cell(f"{surely} / {worse} / {len(one['by_domain'])}"),
                )
            )
        against = names[tests[0]["against"]]
        note = (
            "Paired bootstrap on the same test examples: the difference of the means over domains with its 95 % "
            "interval. An interval that holds 0 shows no difference. Not corrected for the number of tests."
        )
        heads = ("", f"minus {against}", "p", "domains surely better / surely worse / all")
        tables.append(Table(f"{about['title']}: difference from {against}", note, heads, tuple(rows)))
    return tables


def _signed(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return NONE
    return f"{value['difference']:+.{digits}f} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def cost(content: Content) -> Table | None:
    """Returns what rows cost; timings change with the machine, so they stand apart from quality."""
    rows = [row for row in content["rows"] if row["routing"] is None and row["cost"].get("train_tokens")]
    if not rows:
        return None
    made = []
    for row in rows:
        one = row["cost"]
        memory = one["peak_memory_mb"]
        made.append(
            (
                Cell(name_of(row)),
                Cell(f"{one['trained_parameters']:,}"),
                Cell(f"{one['router_parameters']:,}"),
                Cell(f"{one['train_tokens']:,}"),
                Cell(f"{one['train_seconds']:,.0f}"),
                Cell(f"{one['train_tokens'] / max(one['train_seconds'], 1e-9):,.0f}"),
                Cell(NONE if memory is None else f"{memory:,.0f}"),
            )
        )
    heads = ("", "trained parameters of a model", "of them routers", "tokens learned", "seconds", "tokens/s", "peak MB")
    note = (
        "Tokens and seconds are of one seed, all its models and the experts it starts from. Seconds and memory are "
        "this machine's, beside whatever else ran on it."
    )
    return Table("Cost", note, heads, tuple(made))


def data(content: Content) -> Table | None:
    """Returns how much of each domain was learned and measured."""
    rows = []
    for domain, parts in content["data"].items():
        train, test = parts.get("train"), parts["test"]
        cut = sum(part[kind] for part in (train, test) if part for kind in ("shortened", "dropped"))
        rows.append(
            (
                Cell(domain),
                Cell(f"{train['examples']:,}" if train else NONE),
                Cell(f"{train['tokens']:,}" if train else NONE),
                Cell(f"{test['examples']:,}"),
                Cell(f"{test['supervised_tokens']:,}"),
                Cell(f"{cut:,}"),
            )
        )
    heads = ("domain", "training examples", "their tokens", "test examples", "their answer tokens", "cut or left out")
    return Table("Data", "Tokens are the base's.", heads, tuple(rows)) if rows else None


def overlap(content: Content) -> Table | None:
    """Returns what the leakage guard found."""
    rows = [
        (
            Cell(f"{one['train']} (training)"),
            Cell(f"{one['test']} ({'test' if one.get('sides', 'train-test') == 'train-test' else 'training'})"),
            Cell(one["kind"]),
            Cell(f"{one['count']} of {one['of']}"),
        )
        for one in content["overlap"]
    ]
    note = "Rows of the second that occur in the first, word for word or nearly (docs/overlap.md)."
    return Table("Overlap between parts of the data", note, ("in", "of", "kind", "rows"), tuple(rows)) if rows else None


def signatures(content: Content) -> Table | None:
    """Returns what each metric is exactly."""
    rows = []
    for about in content["metrics"].values():
        by_text: dict[str, list[str]] = {}
        for domain, text in about["signatures"].items():
            by_text.setdefault(text, []).append(domain)
        rows += [(Cell(about["title"]), Cell(text), Cell(", ".join(names))) for text, names in by_text.items()]
    return Table("Metrics", "", ("metric", "signature", "domains"), tuple(rows)) if rows else None


def all_tables(content: Content) -> list[Table]:
    """Returns all tables in the order of the page."""
    made = [*quality(content), as_in_moa(content), *paired(content), *routers(content), overlap(content)]
    return [table for table in (*made, data(content), signatures(content), cost(content)) if table is not None]
