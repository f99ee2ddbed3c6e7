"""Reads the answer out of generated text: the letter of an option, the number of a word problem."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from loramix.evaluation.metrics import Measured

# From the most to the least said: "the answer is b" may be small, a letter after "option" or by itself may not.
_ANSWER = re.compile(r"(?i:\banswer(?:\s+is)?\s*:?\s*)\(?([A-Za-z])(?![A-Za-z0-9_'])")
_CHINESE = re.compile(r"【答案】\s*([A-Z])|答案[是为]?[\uff1a:]?\s*([A-Z])")
_OPTION = re.compile(r"(?i:\b(?:option|choice)\s+)\(?([A-Z])(?![A-Za-z0-9_'])")
_ONLY = re.compile(r"\(?([A-Za-z])\)?[.:]?")
# Not \w: in "故选B" a Chinese character stands before the letter.
_ALONE = re.compile(r"(?<![A-Za-z0-9_'])([A-Z])(?![A-Za-z0-9_'])")
# A minus behind a digit or letter is none: "10-5" ends in 5.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARKED = re.compile(r"####\s*([-\u2212]?\$?[\d,]*\.?\d+)")


def letter(answer: str, options: Sequence[str]) -> int | None:
    """Returns the position of the option an answer names, or None.

    In this order: an answer that is the text of one option (case and outer punctuation aside) or nothing but a letter
    ("b", "(C)."), a stated letter ("The answer is B", "【答案】B"), one after "option" or "choice", the first capital
    that stands alone. Letters beyond the options do not count.
    """
    letters = string.ascii_uppercase[: len(options)]
    texts = [_bare(option) for option in options]
    if texts.count(_bare(answer)) == 1 and answer.strip() not in letters:
        return texts.index(_bare(answer))
    only = _ONLY.fullmatch(answer.strip())
    stated = [only] if only is not None else []
    for pattern in (_ANSWER, _CHINESE, _OPTION):
        stated += pattern.finditer(answer)
    stated += [found for found in _ALONE.finditer(answer) if not _is_word(answer, found)]
    for found in stated:
        said = next(group for group in found.groups() if group).upper()
        if said in letters and not (found.re is _ANSWER and _is_word(answer, found)):
            return letters.index(said)
    return None


def _is_word(answer: str, found: re.Match[str]) -> bool:
    """Whether a lone A or I begins a phrase ("A dog ...", "the answer is a dog") rather than naming an option."""
    return found.group(1) in "AIai" and bool(re.match(r" [a-z]", answer[found.end() :]))


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(string.punctuation + " ").casefold()


def number(answer: str) -> Decimal | None:
    """Returns the number an answer gives, or None: the first after "####", as GSM8K's own code reads it (a model that
    runs on may write more of them), else the last number."""
    marked, numbers = _MARKED.findall(answer), _NUMBER.findall(answer)
    found = marked[:1] or numbers[-1:]
    if not found:
        return None
    try:
        return Decimal(found[0].replace(",", "").replace("$", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def same_number(answer: str, reference: str) -> bool:
    """Whether an answer ends in the reference's number; 18, 18.0 and $18 are the same."""
    wanted = number(reference)
    return wanted is not None and number(answer) == wanted


def number_measured(answers: Sequence[str], references: Sequence[str]) -> Measured:
    """Returns how often answers end in their reference's number (GSM8K's exact match)."""
    stats = [[float(same_number(one, wanted)), 1.0] for one, wanted in zip(answers, references, strict=True)]
    return Measured("exact_number", "exact match|number after #### or last|greedy", stats)
