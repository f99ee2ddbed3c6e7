"""Requests as the OpenAI API has them, checked field by field: what loramix cannot do is refused, never ignored in
silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from loramix.serving.sampling import Sampling

MOST_ANSWERS = 4
MOST_STOPS = 16
STOP_CHARS = 64
MOST_MESSAGES = 2048
MOST_BIASES = 300


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 8.0 is a whole one, true is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a whole number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _writable(text: str) -> str:
    """Half a character of two units (a lone surrogate) is in no text that a tokenizer could read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds a lone surrogate, which is no character") from error
    return text


# Bounds stand before the validators: behind them they would be missing from the schema.
Whole = BeforeValidator(_whole)
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
Writable = AfterValidator(_writable)
Str = Annotated[str, Field(strict=True), Writable]
Prompt = Annotated[str, Field(strict=True, min_length=1), Writable]
Name = Annotated[str, Field(strict=True, max_length=256), Writable]
Stop = Annotated[str, Field(strict=True, min_length=1, max_length=STOP_CHARS), Writable]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Strict):
    """A part of a message. Only text: nothing is fetched, and no images, audio or files are read."""

    type: Literal["text"]
    text: Str


class ChatMessage(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: Name | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: Bool = False


class _Request(_Strict):
    """What chat and text completions have in common."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    temperature: Annotated[Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS), Whole] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = None
    presence_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[Float, Field(ge=-100, le=100)]],
            Field(max_length=MOST_BIASES, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = None
    abstain: Bool | None = None
    """loramix's own: whether the base may answer a prompt that is unlike all domains; as calibrated by default."""

    # Read and of no consequence here: clients send them as a matter of course.
    user: Name | None = None
    metadata: Annotated[dict[Name, JsonValue], Field(max_length=16)] | None = None
    store: Bool | None = None
    service_tier: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream = true. Leave it out.")
        return self

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """Returns how the tokens are to be chosen; what is left out is OpenAI's default."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stops(),
            logprobs=logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )


class ResponseFormat(_Strict):
    """Plain text; grammars and schemas are not offered."""

    type: Literal["text"]


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    logprobs: Bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Bool | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(_Request):
    """`POST /v1/completions`: one prompt, as text or as token ids, that no chat template is put around."""

    prompt: Prompt | Annotated[list[Annotated[int, Field(ge=0), Whole]], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5), Whole] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for this route

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class RouteRequest(_Strict):
    """`POST /v1/route`: messages, or a text as one user turn."""

    model: Name
    messages: Messages | None = None
    prompt: Prompt | None = None
    abstain: Bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> RouteRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("expected either messages or prompt")
        return self

    def turns(self) -> list[ChatMessage]:
        return self.messages or [ChatMessage(role="user", content=self.prompt or "")]
