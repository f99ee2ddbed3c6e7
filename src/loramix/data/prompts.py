"""Records to token ids, through the base's own chat template.

Prompt and response are tokenised apart, so that the prompt's tokens in training are exactly those it will have when
someone asks: a router that reads the last prompt token must meet the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loramix.data.records import Message, Record
from loramix.errors import ModelError


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        input_ids: all tokens.
        supervised: for each token whether it is to be learned (part of a response).
        prompt_length: number of tokens before the first response; what a sequence router may read.
    """

    input_ids: list[int]
    supervised: list[bool]
    prompt_length: int


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def render(tokenizer: Any, messages: Sequence[Message], *, reply: bool, tools: Sequence[dict[str, Any]] = ()) -> str:
    """Returns the text of some turns; with `reply` up to where the assistant begins.

    A tokenizer without chat template gets each turn on a line of its own and an empty line before a response.
    """
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(
            _as_dicts(messages), tokenize=False, add_generation_prompt=reply, tools=list(tools) or None
        )
        return text
    end = tokenizer.eos_token or ""
    text = "".join(f"\n{m.content}{end}\n" if m.role == "assistant" else f"{m.content}\n" for m in messages)
    return text + "\n" if reply else text


def encode(tokenizer: Any, record: Record, *, loss_on: str = "response") -> Encoded:
    """Returns the ids of a record, each assistant turn marked as supervised up to and with its end token.

    Args:
        tokenizer: of the base.
        record: the example.
        loss_on: "response", or "all" to learn the prompt too.

    Raises:
        ModelError: the chat template rewrites earlier turns, so a response cannot be told from its prompt.
    """
    end = tokenizer.eos_token or ""
    ids: list[int] = []
    supervised: list[bool] = []
    prompt_length = 0
    done = ""
    for i, message in enumerate(record.messages):
        if message.role != "assistant":
            continue
        prefix = render(tokenizer, record.messages[:i], reply=True, tools=record.tools)
        whole = render(tokenizer, record.messages[: i + 1], reply=False, tools=record.tools)
        if not prefix.startswith(done) or not whole.startswith(prefix):
            raise ModelError(
                f"the chat template renders {record.source} differently once a reply follows, so loramix cannot tell "
                "prompt from response. Use a template whose text only grows with each turn."
            )
        response = whole[len(prefix) :]
        # A template may end a turn with another token than the tokenizer's end (Gemma, Phi-3): both are kept.
        response = response[: response.rindex(end) + len(end)] if end and end in response else response.rstrip()
        asked = _tokens(tokenizer, prefix[len(done) :], first=not ids)
        closing = "" if not end or response.endswith(end) else end
        answered = _tokens(tokenizer, response + closing, first=False)
        ids += asked + answered
        supervised += [loss_on == "all"] * len(asked) + [True] * len(answered)
        prompt_length = prompt_length or len(asked)
        done = prefix + response
    return Encoded(ids, supervised, prompt_length)


def _tokens(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Returns the ids of a piece; special tokens are added only where no template wrote them, at the beginning."""
    special = first and not getattr(tokenizer, "chat_template", None)
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str | Sequence[Message]]) -> Any:
    """Returns a left-padded batch (input_ids, attention_mask) of prompts that the assistant is to answer.

    Args:
        tokenizer: of the base.
        prompts: texts, each one user turn; or whole conversations.
    """
    turns = [[Message("user", one)] if isinstance(one, str) else list(one) for one in prompts]
    rows = [_tokens(tokenizer, render(tokenizer, one, reply=True), first=True) for one in turns]
    return tokenizer.pad({"input_ids": rows}, padding=True, padding_side="left", return_tensors="pt")
