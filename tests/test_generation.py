"""Generated answers: in batches as one by one, as the model's own generate gives them, for every kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from loramix import LoramixConfig
from loramix.data.collation import Example
from loramix.data.prompts import encode
from loramix.data.records import Message, Record
from loramix.evaluation.generation import answer
from tests import tiny

TOKENS = 8


def _examples(tokenizer: Any) -> list[Example]:
    """Prompts of all lengths, out of order; several turns in one of them."""
    prompts = [
        "what is red?",
        "x",
        "tell me of green, at some length, please",
        "blue",
        "and now?",
        "red green blue",
        "?",
    ]
    examples = []
    for number, prompt in enumerate(prompts):
        turns = [Message("user", prompt), Message("assistant", "a reply that nobody shows the model")]
        record = Record(tuple(turns), tiny.EXPERTS[number % 3], f"here:{number}")
        examples.append(Example(encode(tokenizer, record), number % 3, record))
    return examples


def _lively(model: Any) -> Any:
    """Lets adapters differ enough from the base that another expert gives another answer, and answers do not stop."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "loramix" in name:
            parameter.data.normal_(std=0.4)
    model.generation_config.eos_token_id = None
    return model


def _mixture(method: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = LoramixConfig(method=method, r=4, init_lora_weights=False, **settings)
    return _lively(get_peft_model(tiny.llama(vocab=len(tiny.tokenizer())), config).eval())


NAMED = {"experts": tiny.EXPERTS}
MODELS: dict[str, tuple[Any, str]] = {
    "base": (lambda: _lively(tiny.llama(vocab=len(tiny.tokenizer()))), "nothing"),
    "lora": (lambda: _mixture("lora"), "nothing"),
    "mosld": (lambda: _mixture("mosld", allocation="24", target_modules=["q_proj", "v_proj"]), "nothing"),
    "mixlora": (lambda: _mixture("mixlora", num_experts=3), "nothing"),
    "moelora-task": (lambda: _mixture("moelora-task", num_experts=2, domains=tiny.EXPERTS), "domain"),
    "moa": (lambda: _mixture("moa", **NAMED), "prompt"),
    "moa, per layer": (lambda: _mixture("moa", decision="per_layer", **NAMED), "prompt"),
    "moa, pinned": (lambda: _mixture("moa", decision="pinned", **NAMED), "prompt"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_answers_do_not_depend_on_the_batch_and_are_those_of_generate(kind):
    """By hand: one prompt at a time through `generate`, told what the model must be told."""
    build, settled_by = MODELS[kind]
    model, tokenizer = build(), tiny.tokenizer()
    examples = _examples(tokenizer)
    how = {"settled_by": settled_by, "max_new_tokens": TOKENS}
    alone = answer(model, tokenizer, examples, batch_size=1, **how)
    assert answer(model, tokenizer, examples, batch_size=4, **how) == alone
    by_hand = []
    for example in examples:
        prompt = torch.tensor([example.encoded.input_ids[: example.encoded.prompt_length]])
        told: dict[str, Any] = {}
        if settled_by == "domain":
            told["domain_ids"] = torch.tensor([example.domain_id])
        if kind == "moa, pinned":
            told["expert"] = tiny.EXPERTS[example.domain_id]
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, **told
        )
        by_hand.append(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    assert alone == by_hand
    assert len(set(alone)) > 3, "answers that are all alike prove nothing"


def test_the_oracle_answers_with_the_labels_expert():
    model, tokenizer = MODELS["moa"][0](), tiny.tokenizer()
    examples = _examples(tokenizer)
    how = {"settled_by": "prompt", "max_new_tokens": TOKENS}
    oracle = answer(model, tokenizer, examples, oracle=True, **how)
    pinned = answer(MODELS["moa, pinned"][0](), tokenizer, examples, **how)
    assert oracle == pinned
    wrong = [Example(e.encoded, (e.domain_id + 1) % 3, e.record) for e in examples]
    assert answer(model, tokenizer, wrong, oracle=True, **how) != oracle
    assert answer(model, tokenizer, wrong, **how) == answer(model, tokenizer, examples, **how)


def test_only_the_prompt_is_read_and_answers_end_at_the_end_token():
    model, tokenizer = MODELS["base"][0](), tiny.tokenizer()
    (example,) = _examples(tokenizer)[:1]
    how = {"settled_by": "nothing", "max_new_tokens": TOKENS}
    free = answer(model, tokenizer, [example], **how)[0]
    cut = Example(encode(tokenizer, Record((Message("user", "what is red?"), Message("assistant", "")), None, "")), 0)
    assert answer(model, tokenizer, [cut], **how) == [free]
    prompt = torch.tensor([example.encoded.input_ids[: example.encoded.prompt_length]])
    third = int(model.generate(input_ids=prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] + 2])
    model.generation_config.eos_token_id = third
    stopped = answer(model, tokenizer, [example], **how)[0]
    assert len(stopped) < len(free)


def test_no_examples_no_answers():
    assert answer(tiny.llama(), tiny.tokenizer(), [], settled_by="nothing", max_new_tokens=1) == []
