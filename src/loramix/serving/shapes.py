"""How replies to chats and to texts differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramix.serving.answering import Answer
from loramix.serving.ask import Ended, Piece
from loramix.serving.replies import (
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    ChatReply,
    Routing,
    TextChoice,
    TextLogprobs,
    TextReply,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from loramix.serving.sampling import Chosen

LEAST = -9999.0
"""What a log-probability of minus infinity is told as: JSON has no infinity."""


class TokenTexts:
    """The texts of single tokens, for log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def top(self, token: int, logprob: float) -> TopLogprob:
        text = self.text(token)
        # A token that is a part of a character has no text of its own.
        as_bytes = None if "\ufffd" in text else list(text.encode())
        return TopLogprob(token=text, logprob=max(logprob, LEAST), bytes=as_bytes)

    def told(self, chosen: Chosen) -> TokenLogprob:
        own = self.top(chosen.token, chosen.logprob or 0.0)
        return TokenLogprob(**own.model_dump(), top_logprobs=[self.top(*pair) for pair in chosen.top])


class ChatShape:
    """Replies of `/v1/chat/completions`."""

    def __init__(self, texts: TokenTexts, *, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def stream_object(self) -> str:
        return "chat.completion.chunk"

    def whole(self, about: dict[str, Any], answers: Sequence[Answer], usage: Usage, routing: Routing) -> ChatReply:
        choices = [
            ChatChoice(
                index=n,
                message=ChatAnswer(content=answer.text),
                logprobs=self._told(answer.tokens),
                finish_reason=answer.reason,  # type: ignore[arg-type]
            )
            for n, answer in enumerate(answers)
        ]
        return ChatReply(**about, choices=choices, usage=usage, routing=routing)

    def first(self, answers: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": n, "delta": delta, "logprobs": None, "finish_reason": None} for n in range(answers)]

    def delta(self, piece: Piece, offset: int) -> dict[str, Any]:
        told = self._told(piece.tokens)
        return {
            "index": piece.answer,
            "delta": {"content": piece.text},
            "logprobs": None if told is None else told.model_dump(),
            "finish_reason": None,
        }

    def last(self, ended: Ended) -> dict[str, Any]:
        return {"index": ended.answer, "delta": {}, "logprobs": None, "finish_reason": ended.reason}

    def _told(self, tokens: Sequence[Chosen]) -> ChatLogprobs | None:
        return ChatLogprobs(content=[self._texts.told(one) for one in tokens]) if self._logprobs else None


class TextShape:
    """Replies of `/v1/completions`."""

    def __init__(self, texts: TokenTexts, *, logprobs: bool) -> None:
        self._texts, self._logprobs = texts, logprobs

    def stream_object(self) -> str:
        return "text_completion"

    def whole(self, about: dict[str, Any], answers: Sequence[Answer], usage: Usage, routing: Routing) -> TextReply:
        choices = [
            TextChoice(
                index=n,
                text=answer.text,
                logprobs=self._told(answer.tokens, 0),
                finish_reason=answer.reason,  # type: ignore[arg-type]
            )
            for n, answer in enumerate(answers)
        ]
        return TextReply(**about, choices=choices, usage=usage, routing=routing)

    def first(self, answers: int) -> list[dict[str, Any]]:
        return [{"index": n, "text": "", "logprobs": None, "finish_reason": None} for n in range(answers)]

    def delta(self, piece: Piece, offset: int) -> dict[str, Any]:
        told = self._told(piece.tokens, offset)
        return {
            "index": piece.answer,
            "text": piece.text,
            "logprobs": None if told is None else told.model_dump(),
            "finish_reason": None,
        }

    def last(self, ended: Ended) -> dict[str, Any]:
        return {"index": ended.answer, "text": "", "logprobs": None, "finish_reason": ended.reason}

    def _told(self, tokens: Sequence[Chosen], offset: int) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        told = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for one in tokens:
            text = self._texts.text(one.token)
            told.tokens.append(text)
            told.token_logprobs.append(max(one.logprob or 0.0, LEAST))
            told.top_logprobs.append({self._texts.text(token): max(value, LEAST) for token, value in one.top})
            told.text_offset.append(offset)
            offset += len(text)
        return told
