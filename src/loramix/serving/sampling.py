"""Chooses each row's next token from its logits, as its own request asks: no row's choice depends on another's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens chosen and when to stop.

    Attributes:
        max_tokens: of each answer.
        temperature: 0 takes the likeliest token.
        top_p: share of probability that is drawn from, the likeliest first.
        seed: of the draws; None draws anew each time.
        stop: texts that end an answer and are not part of it.
        logprobs: how many alternatives are told of each token; None tells nothing, 0 the chosen token's alone.
        presence_penalty, frequency_penalty: taken from the logits of tokens the answer already has: once, and for
            each time it has them.
        logit_bias: added to the logits of tokens, by id.
        ignore_end: go on behind the end token, up to max_tokens (for benchmarks).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_end: bool = False


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability, and the likeliest alternatives with theirs (by the model, before temperature)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: what the request asks.
        number: which of the request's answers it is; each draws differently.
    """

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self._sampling = sampling
        self._seen: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + number) % 2**63)

    def choose(self, logits_V: Tensor, likeliest: int) -> Chosen:
        """Returns the next token.

        Args:
            logits_V: the model's, (V,).
            likeliest: the token with the largest of them; found for all rows at once, an accelerator waits only once.
        """
        asked = self._sampling
        changed_V = self._changed(logits_V)
        if asked.temperature > 0:
            token = self._drawn(changed_V)
        else:
            token = likeliest if changed_V is logits_V else int(changed_V.argmax())
        self._seen[token] += 1
        if asked.logprobs is None:
            return Chosen(token)
        logprobs_V = logits_V.float().log_softmax(dim=0)
        top = logprobs_V.topk(min(asked.logprobs, len(logprobs_V)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Chosen(token, float(logprobs_V[token]), pairs)

    def _changed(self, logits_V: Tensor) -> Tensor:
        asked = self._sampling
        changes: dict[int, float] = dict(asked.logit_bias)
        if asked.presence_penalty or asked.frequency_penalty:
            for token, times in self._seen.items():
                penalty = asked.presence_penalty + asked.frequency_penalty * times
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits_V
        changed_V = logits_V.float().clone()
        where = torch.tensor(list(changes), device=logits_V.device)
        changed_V[where] += torch.tensor(list(changes.values()), device=logits_V.device)
        return changed_V

    def _drawn(self, logits_V: Tensor) -> int:
        # In double precision on the CPU: the same seed gives the same answer on every device that agrees on the logits.
        scaled_V = logits_V.double().cpu()
        scaled_V = (scaled_V - scaled_V.max()) / self._sampling.temperature
        if self._sampling.top_p >= 1:
            probabilities_V = scaled_V.softmax(dim=0)
            return int(torch.multinomial(probabilities_V, 1, generator=self._generator))
        ordered_V, ids_V = scaled_V.softmax(dim=0).sort(descending=True, stable=True)
        # A token stays while those before it have less than the share: the first always does.
        kept = int((ordered_V.cumsum(dim=0) - ordered_V < self._sampling.top_p).sum())
        drawn = torch.multinomial(ordered_V[: max(1, kept)], 1, generator=self._generator)
        return int(ids_V[drawn])
