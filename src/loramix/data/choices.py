"""Multiple-choice rows, in the shapes people meet, all rendered by one template.

One template for all data, so that a score never depends on where a question came from (methods.md 4.1 lists how the
papers differ in this). The response is the letter of the right option; letters go by position, whatever the file calls
its options (ARC numbers some of them).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from loramix.data.row_error import RowError

LETTERS = string.ascii_uppercase
CONTEXTS = ("context", "article", "passage", "story")
ANSWERS = ("answer", "answerKey", "label")
_ASKED = "Answer with the letter of the right option."

Row = Mapping[str, Any]


def is_choice(row: Row) -> bool:
    """Whether a row is a question with options."""
    return "question" in row and _options_of(row) is not None and any(key in row for key in ANSWERS)


def read_choice(row: Row) -> tuple[str, str, tuple[str, ...]]:
    """Returns (prompt, letter of the right option, texts of the options) of a row.

    Raises:
        RowError: no question, fewer than two options, or an answer that names none of them.
    """
    found = _options_of(row)
    assert found is not None
    options, labels = found
    question = _question(row)
    if len(options) < 2 or len(options) > len(LETTERS) or not all(isinstance(o, str) and o.strip() for o in options):
        raise RowError(f"has {len(options)} options, some empty or no text. Expected 2 to {len(LETTERS)} texts.")
    options = [option.strip() for option in options]
    right = _right(row, options, labels)
    context = next((row[key] for key in CONTEXTS if isinstance(row.get(key), str) and row[key].strip()), None)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    parts = [context.strip()] if context else []
    prompt = "\n\n".join([*parts, "\n".join([question.strip(), *lines, _ASKED])])
    return prompt, LETTERS[right], tuple(options)


def _question(row: Row) -> str:
    question = row.get("question")
    if isinstance(question, Mapping):
        question = question.get("stem")
    if not isinstance(question, str) or not question.strip():
        raise RowError('has options, but "question" is no text. Expected what is asked.')
    return question


def _options_of(row: Row) -> tuple[list[Any], list[str]] | None:
    """Returns the options and what the file calls them, or None for a row that has none."""
    question = row.get("question")
    choices = row.get("choices", row.get("options"))
    if choices is None and isinstance(question, Mapping):
        choices = question.get("choices")
    if isinstance(choices, Mapping) and all(isinstance(choices.get(key), list) for key in ("text", "label")):
        return choices["text"], [str(label) for label in choices["label"]]
    if isinstance(choices, Sequence) and not isinstance(choices, str) and choices:
        if all(isinstance(one, Mapping) and "text" in one for one in choices):
            return [one["text"] for one in choices], [str(one.get("label", "")) for one in choices]
        return list(choices), list(LETTERS[: len(choices)])
    for names in (LETTERS, [f"choice{number}" for number in range(len(LETTERS))]):
        columns = [name for name in names if name in row]
        if "question" in row and len(columns) >= 2 and columns == list(names[: len(columns)]):
            filled = [name for name in columns if row[name] not in (None, "")]
            return [str(row[name]) for name in filled], list(LETTERS[: len(filled)])
    return None


def _right(row: Row, options: Sequence[str], labels: Sequence[str]) -> int:
    """Returns the position of the right option: named by label, by letter, by number from 0, or by its text."""
    answer = next((row[key] for key in ANSWERS if row.get(key) is not None), None)
    said = str(answer).strip()
    letters = LETTERS[: len(options)]
    positions = [str(position) for position in range(len(options))]
    # "1" among the options 8, 1, 24 is a position, as in MMLU's files; "24" can only be the option's text.
    for names in (labels, letters, letters.lower(), positions, options):
        if said in list(names) and list(names).index(said) < len(options):
            return list(names).index(said)
    raise RowError(
        f"has the answer {answer!r:.40}, which names none of its {len(options)} options. Expected a letter, a position "
        "from 0, a label, or the option's text."
    )
