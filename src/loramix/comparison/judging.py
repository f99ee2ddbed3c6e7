"""Asks a language model to judge the answers of a comparison, where an endpoint is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loramix.comparison.lines import Line
from loramix.comparison.settings import JudgeSettings
from loramix.errors import ConfigError
from loramix.evaluation.chat_endpoint import CachedChat, endpoint_for
from loramix.evaluation.judge import NO_ENDPOINT, Answered, Judge, judge_rows

Answers = dict[str, list[Answered]]


def judged(
    settings: JudgeSettings | None, lines: Sequence[Line], against: str | None, cache: Path, console: Console
) -> dict[str, Any] | None:
    """Returns what the judge says of every row's answers (of its first seed), or None where nobody was asked.

    An endpoint that refuses does not lose the comparison: what it said is shown, and what it answered is kept.

    Args:
        settings: whom to ask; None asks nobody.
        lines: the rows.
        against: the row others are compared with in pairs.
        cache: file of kept replies.
        console: where cost and problems are shown.
    """
    if settings is None:
        return None
    endpoint = endpoint_for(
        settings.model, settings.base_url, input_price=settings.input_price, output_price=settings.output_price
    )
    if endpoint is None:
        console.print(NO_ENDPOINT, highlight=False)
        return None
    rows = {line.id: found for line in lines if line.routing is None and (found := _answers(line))}
    judge = Judge(CachedChat(endpoint, cache))
    estimate = judge.estimate([one for by in rows.values() for part in by.values() for one in part])
    console.print(f"judge, scores: {estimate.text(estimated=True)}", highlight=False)
    try:
        result = judge_rows(judge, rows, against)
    except ConfigError as error:
        console.print(f"judge: {error}", markup=False, highlight=False)
        return None
    console.print(f"judge: {judge.chat.cost().text(estimated=False)}", highlight=False)
    return result


def _answers(line: Line) -> Answers:
    """Returns domain -> answers of a row's first seed."""
    if not line.cells:
        return {}
    return {
        domain: [Answered(one["prompt"], one["reference"], one["answer"]) for one in answered]
        for measured in line.cells[min(line.cells)].values()
        for domain, answered in measured["answers"].items()
    }
