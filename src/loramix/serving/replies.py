"""Replies in the shapes of the OpenAI API, with one field of our own: `routing`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from loramix.serving.ask import Routed


class Model(BaseModel):
    """What a request may name as its model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loramix"
    parent: str | None
    """The mixture an expert belongs to; null for the mixture itself."""
    kind: Literal["mixture", "expert", "base"]


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Routing(BaseModel):
    """Which expert answers, and why."""

    expert: str | None
    decision: str
    probability: float | None
    probabilities: dict[str, float]
    score: float | None
    threshold: float | None

    @staticmethod
    def of(routed: Routed) -> Routing:
        return Routing(
            expert=routed.expert,
            decision=routed.decision,
            probability=routed.probability,
            probabilities=routed.probabilities,
            score=routed.score,
            threshold=routed.threshold,
        )


class RouteReply(BaseModel):
    """`POST /v1/route`."""

    object: Literal["routing"] = "routing"
    model: str
    routing: Routing


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A chosen token, with the likeliest others."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswer(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer of a chat."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    """`POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    routing: Routing


class TextLogprobs(BaseModel):
    """Log-probabilities of a continued text, token by token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextReply(BaseModel):
    """`POST /v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    routing: Routing


class Health(BaseModel):
    """`GET /health`."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every error."""

    error: ErrorDetail


def error(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns an error in OpenAI's shape."""
    return ErrorReply(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()
