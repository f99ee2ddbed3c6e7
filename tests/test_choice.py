"""Multiple choice by letters against plain forwards; letters and numbers read out of answers."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramix.data.collation import Example
from loramix.data.prompts import encode
from loramix.data.records import Message, Record
from loramix.errors import ModelError
from loramix.evaluation.choice import choice_generated, choice_measured, letter_ids
from loramix.evaluation.evaluate import measure_routed
from loramix.evaluation.extraction import letter, number, number_measured, same_number
from loramix.evaluation.metrics import value_of
from loramix.evaluation.scoring import Score, score
from tests import tiny

OPTIONS = ("iron", "the moon", "a dog", "seven", "Vitamin C")


def _record(question: str, right: int, options: int = 4) -> Record:
    turns = (Message("user", question), Message("assistant", "ABCDE"[right]))
    return Record(turns, "d", "here", choices=OPTIONS[:options])


def _examples(tokenizer: Any, count: int = 9) -> list[Example]:
    records = [_record(f"question {'?' * n} {n * n}", n % 2, 3 + n % 3) for n in range(count)]
    return [Example(encode(tokenizer, record), n % 3, record) for n, record in enumerate(records)]


def _plain(tokenizer: Any, text: str) -> Example:
    record = Record((Message("user", text), Message("assistant", "an answer in words")), "d", "here")
    return Example(encode(tokenizer, record), 0, record)


# ---- by the letters' logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routed", [False, True])
def test_the_chosen_letter_is_the_likeliest_continuation_of_the_prompt(routed):
    """By hand: one unpadded forward of the prompt alone, and the logits of the letters of its own options."""
    tokenizer = tiny.tokenizer()
    model = tiny.llama(vocab=len(tokenizer))
    model = tiny.moa(model) if routed else model
    examples = [*_examples(tokenizer), _plain(tokenizer, "no options here")]
    ids = letter_ids(tokenizer, examples)
    assert ids == [tokenizer.convert_tokens_to_ids(one) for one in "ABCDE"]
    told = [example.domain_id for example in examples] if routed else None
    scores = score(model, examples, pad_token_id=tiny.PAD, experts=told, letters=ids, batch_size=4)
    right = []
    for example, got in zip(examples, scores, strict=True):
        prompt = torch.tensor([example.encoded.input_ids[: example.encoded.prompt_length]])
        asked = {"domain_ids": torch.tensor([example.domain_id])} if routed else {}
        with torch.no_grad():
            logits = model(input_ids=prompt, **asked).logits[0, -1, ids]
        torch.testing.assert_close(torch.tensor(got.letters), logits, rtol=1e-4, atol=1e-5)
        if example.record.choices:
            chosen = logits[: len(example.record.choices)].argmax().item()
            right.append(float(chosen == example.record.right))
    measured = choice_measured(examples, scores)
    assert measured.stats == [[one, 1.0] for one in right]
    assert value_of("choice", measured.stats) == pytest.approx(100 * sum(right) / len(right))


def test_letters_come_with_the_loss_in_one_pass_and_change_nothing():
    tokenizer = tiny.tokenizer()
    model = tiny.llama(vocab=len(tokenizer))
    examples = _examples(tokenizer)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with_letters = score(model, examples, pad_token_id=tiny.PAD, letters=letter_ids(tokenizer, examples), batch_size=3)
    assert len(forwards) == 3
    plain = score(model, examples, pad_token_id=tiny.PAD, batch_size=3)
    assert [dataclasses.replace(one, letters=()) for one in with_letters] == plain


def test_routed_models_are_measured_under_every_decision():
    tokenizer = tiny.tokenizer()
    model = tiny.moa(tiny.llama(vocab=len(tokenizer)))
    examples = _examples(tokenizer)
    held = {name: [e for e in examples if e.domain_id == i] for i, name in enumerate(tiny.EXPERTS)}
    result = measure_routed(model, held, pad_token_id=tiny.PAD, letters=letter_ids(tokenizer, examples))
    for decision in ("oracle", "last", "vote", "per_layer"):
        for domain, part in held.items():
            assert len(choice_measured(part, result.by_decision[decision][domain]).stats) == len(part)
    labels = score(
        model, held["green"], pad_token_id=tiny.PAD, experts=[1] * 3, letters=letter_ids(tokenizer, examples)
    )
    for one, other in zip(result.by_decision["oracle"]["green"], labels, strict=True):
        assert one.letters == pytest.approx(other.letters, rel=1e-4, abs=1e-5)


def test_letters_beyond_the_options_do_not_count():
    example = Example(encode(tiny.tokenizer(), _record("q", 0, options=3)), 0, _record("q", 0, options=3))
    scores = [Score(1.0, 1, (0.5, 0.1, 0.2, 9.0, 9.0))]
    assert choice_measured([example], scores).stats == [[1.0, 1.0]]


def test_without_options_there_is_nothing_to_choose():
    tokenizer = tiny.tokenizer()
    examples = [_plain(tokenizer, "hello")]
    assert letter_ids(tokenizer, examples) == []
    assert choice_measured(examples, [Score(1.0, 1)]) is None
    assert choice_generated(examples, ["B"]) is None


# ---- which token a letter is -----------------------------------------------------------------------------------------


def _spaced_tokenizer(merged: bool) -> PreTrainedTokenizerFast:
    """A template whose reply begins with a space; with `merged` the tokenizer has " A" as one token, beside "A"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", one) for one in "ABCDE"] if merged else []
    tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>")
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}Answer: {{ m.content }}<|im_end|>{% else %}"
        "{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    )
    return made


def test_a_letter_is_the_token_it_has_behind_the_prompt():
    tokenizer = _spaced_tokenizer(merged=True)
    ids = letter_ids(tokenizer, _examples(tokenizer))
    assert [tokenizer.convert_ids_to_tokens(one) for one in ids] == [f"Ġ{one}" for one in "ABCDE"]
    trained = [example.encoded.input_ids[example.encoded.prompt_length] for example in _examples(tokenizer)]
    assert set(trained) == set(ids[:2])


def test_letters_that_begin_alike_cannot_be_compared():
    tokenizer = _spaced_tokenizer(merged=False)
    with pytest.raises(ModelError, match="same token"):
        letter_ids(tokenizer, _examples(tokenizer))


# ---- letters out of answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "position"),
    [
        ("B", 1),
        ("B.", 1),
        ("(C)", 2),
        ("**D**", 3),
        ("The answer is B.", 1),
        ("The answer is (B), because A is wrong.", 1),
        ("Answer: C", 2),
        ("The correct option is D", 3),
        ("A is wrong, so the answer is B", 1),
        ("【答案】B", 1),
        ("【答案】 C\n【解析】A 不对", 2),
        ("答案是B", 1),
        ("答案\uff1aD", 3),
        ("B. the moon", 1),
        ("故选B。", 1),
        ("答案D", 3),
        ("答案是\uff1aD", 3),
        ("I think it is C", 2),
        ("A dog", 2),
        ("A cat", None),
        ("a dog.", 2),
        ("The Moon", 1),
        (" iron\n", 0),
        ("E", None),
        ("iron or the moon", None),
        ("", None),
        ("no idea", None),
    ],
)
def test_letters_are_read_out_of_answers(answer, position):
    assert letter(answer, OPTIONS[:4]) == position


def test_an_answer_that_is_an_options_text_names_it_whatever_letters_it_holds():
    assert letter("Vitamin C", ("Vitamin C", "Vitamin D", "salt")) == 0
    assert letter("B", ("B", "A", "salt")) == 1


def test_generated_choices_count_only_questions_with_options():
    tokenizer = tiny.tokenizer()
    examples = [*_examples(tokenizer, 3), _plain(tokenizer, "B")]
    measured = choice_generated(examples, ["The answer is A", "A", "nothing", "B"])
    assert measured.stats == [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]


# ---- numbers out of answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18"),
        ("#### 18.", "18"),
        ("#### $1,234.50", "1234.50"),
        ("#### -3", "-3"),
        ("####5", "5"),
        ("He pays 2 for 3, so 6.", "6"),
        ("The total is $1,250,000.", "1250000"),
        ("costs $.75", ".75"),
        ("x = -7", "-7"),
        ("18.0", "18.0"),
        ("from 10-5", "5"),
        ("(-5)", "-5"),
        ("\u22127", "-7"),
        ("#### 18\n\nQuestion: ...\n#### 19", "18"),
        ("50%", "50"),
        ("no number", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_numbers_are_read_out_of_answers(answer, value):
    assert number(answer) == (None if value is None else Decimal(value))


def test_numbers_are_compared_as_numbers():
    assert same_number("#### 18.00", "so it is\n#### 18")
    assert same_number("about $1,800", "#### 1800")
    assert not same_number("18 or 19", "#### 18")
    assert not same_number("no idea", "#### 18")
    assert not same_number("no idea", "none either")
    assert number_measured(["#### 2", "3"], ["#### 2", "#### 4"]).stats == [[1.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("answer", "position"),
    [
        ("b", 1),
        ("(c)", 2),
        ("The answer is b.", 1),
        ("I think option A is wrong. The correct answer is C.", 2),
        ("The answer is B. The answer is C.", 1),
        ("A dog barks. B", 1),
        ("The answer is a dog", None),
        ("Vitamin C", 3),
        ("E", None),
    ],
)
def test_letters_are_read_as_people_mean_them(answer: str, position: int | None):
    assert letter(answer, ("Paris", "Rome", "Oslo", "Vitamin C")) == position
