"""Tables of what came out: every metric, the layout of the MoA paper, paired differences, the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramix.reports.reading import Content
from loramix.reports.tables import NONE, Cell, Table, bases, competes, name_of, names, spread


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
    pooled = _relabelled(rows, metric)
    best = {domain: _best(rows, metric, domain, about["better"]) for domain in (*domains, None)}
    named = names(content)
    made = []
    for row in rows:
        scores = row["scores"][metric]
        cells = [Cell(named[row["id"]])]
        for domain in domains:
            value = scores["by_domain"].get(domain)
            cells.append(Cell(spread(value, about["digits"]), row["id"] in best[domain]))
        cells.append(Cell(_interval(scores["average"], about["digits"]), row["id"] in best[None]))
        if pooled:
            cells.append(Cell(_interval(scores.get("pooled"), about["digits"])))
        made.append(tuple(cells))
    heads = ("", *(f"{d} (unseen)" if d in content["unseen"] else d for d in domains), "mean")
    heads = (*heads, "all examples") if pooled else heads
    return Table(about["title"], _quality_note(content, metric, rows), heads, tuple(made))


def _relabelled(rows: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Returns whether rows have different domains and a score over all their examples."""
    scores = [row["scores"][metric] for row in rows]
    differ = len({frozenset(one["by_domain"]) for one in scores}) > 1
    return differ and all(one.get("pooled") is not None for one in scores)


def _quality_note(content: Content, metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    way = "Lower" if content["metrics"][metric]["better"] == "lower" else "Higher"
    of = "of each column and base" if len(bases(content)) > 1 else "of each column"
    note = f"{way} is better; the best {of} is bold. The base and experts chosen by the label do not compete."
    seeds = max((len(row["seeds"]) for row in rows), default=1)
    note += f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else " One seed."
    averages = [row["scores"][metric]["average"] for row in rows]
    if any(value is not None and value.get("low") is not None for value in averages):
        note += " The mean over domains has the 95 % interval of a bootstrap over test examples in brackets."
    if any(value is None for value in averages):
        note += " A row without some domain has no mean."
    if _relabelled(rows, metric):
        note += (
            " All examples: the examples of all of a row's domains as one; compare it between rows that have the same"
            " examples under different labels."
        )
    if content["unseen"]:
        note += " Unseen domains are not in the mean."
    if metric == "perplexity" and len(bases(content)) > 1:
        note += " Perplexities of bases with different tokenizers cannot be compared."
    return note


def _best(rows: Sequence[Mapping[str, Any]], metric: str, domain: str | None, better: str) -> set[str]:
    """Returns the ids of the best rows of a column, for each base; none where all are equal."""
    by_base: dict[str, dict[str, float]] = {}
    for row in rows:
        scores = row["scores"][metric]
        value = scores["average"] if domain is None else scores["by_domain"].get(domain)
        if value is not None and competes(row):
            by_base.setdefault(row["base"], {})[row["id"]] = value["mean"]
    found: set[str] = set()
    for values in by_base.values():
        if len(set(values.values())) >= 2:
            wanted = (min if better == "lower" else max)(values.values())
            found |= {name for name, value in values.items() if value == wanted}
    return found


def _interval(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None or value.get("low") is None:
        return spread(value, digits)
    return f"{spread(value, digits)} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def as_in_moa(content: Content) -> list[Table]:
    """Returns, for each base with MoA and the single LoRA, MoA's Tables 2 and 8 in their layout, domains as rows."""
    made = [_as_in_moa(content, base) for base in bases(content)]
    return [table for table in made if table is not None]


def _as_in_moa(content: Content, base: str) -> Table | None:
    wanted = (
        (("lora", "single", None), "single"),
        (("lora", "mixture", None), "mixed"),
        (("lora-long", "single", None), "single, as long"),
        (("moa", "mixture", None), "MoA"),
        (("moa", "mixture", "oracle"), "expert of MoA alone"),
        (("moe-lora", "mixture", None), "MoE-LoRA"),
        (("moe-lora", "mixture", "extracted"), "expert of MoE-LoRA alone"),
    )
    found = {
        (row["label"], row["setting"], row["routing"]): row["scores"]["perplexity"]
        for row in content["rows"]
        if row["base"] == base and "perplexity" in row["scores"]
    }
    there = [(found[key], head) for key, head in wanted if key in found]
    if not {("lora", "single", None), ("moa", "mixture", None)} <= set(found):
        return None
    rows = []
    for domain in (*content["domains"], None):
        values = [scores["average"] if domain is None else scores["by_domain"].get(domain) for scores, _ in there]
        rows.append((Cell("mean" if domain is None else domain), *(Cell(spread(value, 3)) for value in values)))
    note = (
        "The layout of MoA's Tables 2 and 8. An expert alone is the LoRA taken out of the mixture and used without any "
        "router; for MoA, whose experts never mix, that is the mixture with the label's expert."
    )
    title = "As in the MoA paper: perplexity" + (f", {base}" if len(bases(content)) > 1 else "")
    return Table(title, note, ("domain", *(head for _, head in there)), tuple(rows))


def unmeasured(content: Content) -> str:
    """Returns a sentence that names the rows without any measurement, so that none is missing unseen; else nothing."""
    missing = [names(content)[row["id"]] for row in content["rows"] if not row["scores"]]
    return f"Without results (a cell failed or is not finished): {'; '.join(missing)}." if missing else ""


def paired(content: Content) -> list[Table]:
    """Returns, for each metric, the differences of all rows from one, with their intervals."""
    tables = []
    for metric, about in content["metrics"].items():
        tests = [one for one in content["paired"] if one["metric"] == metric]
        if not tests:
            continue
        rows = []
        named = names(content)
        for one in tests:
            average = one["average"]
            domains = one["by_domain"].values()
            down = about["better"] == "lower"
            surely = sum((d["high"] < 0) if down else (d["low"] > 0) for d in domains)
            worse = sum((d["low"] > 0) if down else (d["high"] < 0) for d in domains)
            rows.append(
                (
                    Cell(named[one["row"]]),
                    Cell(_signed(average, about["digits"])),
                    Cell(NONE if average is None else _p(average["p"])),
                    Cell(f"{surely} / {worse} / {len(one['by_domain'])}"),
                )
            )
        against = named[tests[0]["against"]]
        note = (
            "Paired bootstrap on the same test examples: the difference of the means over domains with its 95 % "
            "interval. An interval that holds 0 shows no difference. Not corrected for the number of tests."
        )
        heads = ("", f"minus {against}", "p", "domains better / worse beyond the interval / all")
        tables.append(Table(f"{about['title']}: difference from {against}", note, heads, tuple(rows)))
    return tables


def _signed(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return NONE
    return f"{value['difference']:+.{digits}f} [{value['low']:+.{digits}f}, {value['high']:+.{digits}f}]"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def judge(content: Content) -> list[Table]:
    """Returns what a language model said of the answers: its points, and who won in pairs."""
    found = content["judge"]
    if not found:
        return []
    called = {row["id"]: name_of(row) for row in content["rows"]} | names(content)
    domains = [d for d in (*content["domains"], *content["unseen"]) if any(d in by for by in found["scores"].values())]
    rows = []
    for row, by_domain in found["scores"].items():
        values = [by_domain[domain]["mean"] if domain in by_domain else None for domain in domains]
        unread = sum(one["unread"] for one in by_domain.values())
        cells = [Cell(NONE if value is None else f"{value:.1f}") for value in values]
        rows.append((Cell(called.get(row, row)), *cells, Cell(str(unread))))
    made = [
        Table(
            "Judged by a language model: points of 100",
            f"First seed. Unread: verdicts in which no number was found; they count nowhere. {found['signature']}",
            ("", *domains, "unread"),
            tuple(rows),
        )
    ]
    if found["pairs"]:
        counted = ("first", "tie", "second", "disagreed", "unread")
        rows = []
        for row, by_domain in found["pairs"].items():
            sums = [sum(one[kind] for one in by_domain.values()) for kind in counted]
            rows.append((Cell(called.get(row, row)), *(Cell(str(count)) for count in sums)))
        against = called.get(found["against"], found["against"])
        note = "Every pair was asked in both orders; where the orders disagree it is a tie."
        heads = ("", "won", "tie", "lost", "of the ties: orders disagreed", "unread")
        made.append(Table(f"Judged in pairs against {against}", note, heads, tuple(rows)))
    return made
