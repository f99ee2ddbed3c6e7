"""Answers a conversation, of which no more is sent than the model's context holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loramix.cli.chatting.conversation import Asked
from loramix.cli.chatting.streaming import Stopped, TextStream
from loramix.cli.chatting.voices import Voice, speaking
from loramix.data.prompts import encode_prompts
from loramix.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """What is sent to the model.

    Attributes:
        batch: input_ids and attention_mask (1, T), on the model's device.
        left_out: how many of the oldest turns are not in it.
        room: how many tokens the answer may have.
    """

    batch: dict[str, Tensor]
    left_out: int
    room: int


class Answering:
    """A model that answers prompts.

    Args:
        model: of a run.
        tokenizer: of its base.
        max_new_tokens: length of an answer at most.
        temperature: 0 for the likeliest token each time, else how freely tokens are drawn.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._most = max_new_tokens
        self._drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self._context = context_of(model)

    def read(self, asked: Asked) -> Prompt:
        """Returns what is sent: as many of the latest turns as the context holds beside the answer.

        Raises:
            DataError: the prompt alone is too long.
        """
        reserved = 0 if self._context is None else min(self._most, self._context // 4)
        left_out = 0
        batch = self._encoded(asked, left_out)
        while (room := self._room(batch)) < reserved and left_out < len(asked.earlier):
            left_out += 1
            batch = self._encoded(asked, left_out)
        if room < 1:
            raise DataError(
                f"the prompt has {batch['input_ids'].shape[1]} tokens, with what the template and the system text add, "
                f"but the model reads {self._context} together with its answer. Shorten the prompt."
            )
        return Prompt(batch, left_out, room)

    def answer(self, prompt: Prompt, voice: Voice, stream: TextStream, stopped: Callable[[], bool]) -> None:
        """Generates an answer into a stream, until its end or until `stopped` says so after a token."""
        with speaking(self._model, voice):
            self._model.generate(
                **prompt.batch,
                **voice.told,
                **self._drawn,
                max_new_tokens=prompt.room,
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=stream,
                stopping_criteria=[Stopped(stopped)],
            )

    def stream(self, say: Callable[[str], None]) -> TextStream:
        """Returns a new stream."""
        return TextStream(self._tokenizer, say)

    def _encoded(self, asked: Asked, left_out: int) -> dict[str, Tensor]:
        encoded = encode_prompts(self._tokenizer, [asked.messages(left_out)])
        return {name: tensor.to(self._model.device) for name, tensor in encoded.items()}

    def _room(self, batch: dict[str, Tensor]) -> int:
        return self._most if self._context is None else min(self._most, self._context - batch["input_ids"].shape[1])


def context_of(model: Any) -> int | None:
    """Returns how many tokens a model reads at most, prompt and answer together; None where it does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    adapters = getattr(model, "peft_config", {}).values()
    return most - max((getattr(one, "num_virtual_tokens", None) or 0 for one in adapters), default=0)
