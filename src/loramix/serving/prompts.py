"""Texts of requests to token ids. A control token that somebody writes into a text is read as the text it is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from loramix.data.records import Message
from loramix.serving.ask import EngineError
from loramix.serving.protocol import ChatMessage


class PromptEncoder:
    """Encodes prompts as in training, but for control tokens in what users wrote.

    Args:
        tokenizer: of the base. Its own state changes while it encodes, so one thread at a time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Returns the ids of a conversation up to where the assistant begins.

        Raises:
            EngineError: the base's chat template refuses it.
        """
        turns = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]
        with self._lock:
            if not getattr(self._tokenizer, "chat_template", None):
                return self._plain(turns)
            try:
                return tuple(
                    self._tokenizer.apply_chat_template(
                        [{"role": turn.role, "content": turn.content} for turn in turns],
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=False,
                        sanitize_control_tokens=True,
                    )
                )
            except Exception as error:  # whatever a template raises: of roles in a wrong order, for example
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise EngineError(f"The chat template of the base refuses these messages: {said}", 400) from error

    def text(self, prompt: str) -> tuple[int, ...]:
        """Returns the ids of a text as it is, behind the token with which the base's texts begin, if they do."""
        with self._lock:
            return tuple(self._tokenizer(prompt, split_special_tokens=True)["input_ids"])

    def _plain(self, turns: Sequence[Message]) -> tuple[int, ...]:
        """As `loramix.data.prompts` encodes turns where the base has no template: each response and its end apart."""
        ids: list[int] = []
        pending, first = "", True
        for turn in turns:
            if turn.role != "assistant":
                pending += f"{turn.content}\n"
                continue
            ids += [*self._tokens(f"{pending}\n", first=first), *self._tokens(turn.content, first=False)]
            ids += [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
            pending, first = "\n", False
        return tuple(ids + self._tokens(f"{pending}\n", first=first))

    def _tokens(self, text: str, *, first: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=first, split_special_tokens=True)["input_ids"])
