"""Multiple-choice accuracy: by the logits of the options' letters (default), or by what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loramix.data.choices import LETTERS
from loramix.data.collation import Example
from loramix.data.prompts import encode
from loramix.data.records import Message
from loramix.errors import ModelError
from loramix.evaluation.extraction import letter
from loramix.evaluation.metrics import Measured, Stats
from loramix.evaluation.scoring import Score


def letter_ids(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Returns the token id with which a response that is a letter begins, for as many letters as examples have options.

    The response is encoded as in training, so " A" and "A" are told apart as this tokenizer does.

    Args:
        tokenizer: of the base.
        examples: some of them with options.

    Raises:
        ModelError: two letters begin with the same token, so their logits cannot be compared.
    """
    options = max((len(e.record.choices) for e in examples if e.record is not None), default=0)
    record = next((e.record for e in examples if e.record is not None and e.record.choices), None)
    if record is None:
        return []
    ids = []
    for one in LETTERS[:options]:
        encoded = encode(tokenizer, replace(record, messages=(*record.messages[:-1], Message("assistant", one))))
        ids.append(encoded.input_ids[encoded.prompt_length])
    if len(set(ids)) < len(ids):
        raise ModelError(
            "this base's tokenizer begins several of the letters A, B, C, ... with the same token, so options cannot "
            "be compared by their letters. Measure choices by generation (choice_by_generation)."
        )
    return ids


def choice_measured(examples: Sequence[Example], scores: Sequence[Score]) -> Measured | None:
    """Returns the accuracy by letters of the examples that have options; None where none has.

    Args:
        examples: with their records.
        scores: of the same examples, made by `score` with `letters`.
    """
    stats: Stats = []
    for example, score in zip(examples, scores, strict=True):
        if example.record is None or example.record.right is None or not score.letters:
            continue
        logits = score.letters[: len(example.record.choices)]
        chosen = max(range(len(logits)), key=logits.__getitem__)
        stats.append([float(chosen == example.record.right), 1.0])
    return (
        Measured("choice", "accuracy|letter logits at the last prompt token|prompt:loramix", stats) if stats else None
    )


def choice_generated(examples: Sequence[Example], answers: Sequence[str]) -> Measured | None:
    """Returns the accuracy of generated answers of the examples that have options; None where none has."""
    stats: Stats = [
        [float(letter(answer, e.record.choices) == e.record.right), 1.0]
        for e, answer in zip(examples, answers, strict=True)
        if e.record is not None and e.record.choices
    ]
    return Measured("choice_generated", "accuracy|greedy|letter extracted|prompt:loramix", stats) if stats else None
