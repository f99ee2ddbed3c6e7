"""Tables of how it was run: routers beside a text classifier, cost, data, overlap, the metrics' signatures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramix.reports.reading import Content
from loramix.reports.tables import NONE, Cell, Table, names, pooled


def routers(content: Content) -> list[Table]:
    """Returns router accuracy by domain and decision beside a text classifier's (as MoA's Table 3), for each row."""
    named = names(content)
    return [_routers(content, row, named.get(row, row), found) for row, found in content["routing"].items()]


def _routers(content: Content, row: str, name: str, found: Mapping[str, Any]) -> Table:
    decisions = list(found["decisions"])
    baselines = content["classifier"]
    rows = []
    for domain in (*content["domains"], None):
        cells = [Cell("all prompts" if domain is None else domain)]
        for one in (*(found["decisions"][d] for d in decisions), *baselines.values()):
            value = one["accuracy"] if domain is None else one["by_domain"].get(domain)
            cells.append(Cell(NONE if value is None else f"{100 * value:.1f} %"))
        rows.append(tuple(cells))
    note = (
        f"Share of {found['prompts']} held-out prompts{pooled(content, row)} that are sent to the expert of their label"
    )
    if baselines:
        note += "; the classifier learned from the same training prompts and was asked about the same held-out ones"
    ece = (found.get("calibration") or {}).get("ece")
    note += "." if ece is None else f". Expected calibration error of the last router: {100 * ece:.1f} points."
    told = {"last": "the last router decides", "vote": "most routers", "per_layer": "each router for its own layer"}
    note += " Decisions: " + "; ".join(f"{d}, {told[d]}" for d in decisions if d in told) + "."
    return Table(f"Who is sent to the right expert: {name}", note, ("domain", *decisions, *baselines), tuple(rows))


def cost(content: Content) -> Table | None:
    """Returns what rows cost; timings change with the machine, so they stand apart from quality."""
    rows = [row for row in content["rows"] if row["routing"] is None and row["cost"].get("train_tokens")]
    if not rows:
        return None
    made = []
    named = names(content)
    for row in rows:
        one = row["cost"]
        memory = one["peak_memory_mb"]
        made.append(
            (
                Cell(named[row["id"]]),
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
    note = "Rows of the second that occur in the first, word for word (exact) or nearly (near)."
    heads = ("in", "of", "kind", "rows")
    return Table("Overlap between parts of the data", note, heads, tuple(rows), words=True) if rows else None


def signatures(content: Content) -> Table | None:
    """Returns what each metric is exactly."""
    rows = []
    for about in content["metrics"].values():
        by_text: dict[str, list[str]] = {}
        for domain, text in about["signatures"].items():
            by_text.setdefault(text, []).append(domain)
        rows += [(Cell(about["title"]), Cell(text), Cell(", ".join(names))) for text, names in by_text.items()]
    note = "Compare numbers of equal signatures only."
    return Table("Metrics", note, ("metric", "signature", "domains"), tuple(rows), words=True) if rows else None
