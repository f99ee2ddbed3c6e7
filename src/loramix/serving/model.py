"""A run's model as an engine drives it: prompts are settled, then rows of different experts go through it together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from loramix.errors import ConfigError
from loramix.methods import Method
from loramix.serving.ask import Ask, EngineError, Routed
from loramix.tuner.abstaining import BASE
from loramix.tuner.decisions import decision_problem, last_scope_needed
from loramix.tuner.held import Held, held_together, rows_held
from loramix.tuner.routes import Route, pinned_route
from loramix.tuner.settling import Wish, settle_prompts

Lane = Literal["mixture", "base"]
"""Rows of a lane go through the model together. The base has its own where the mixture cannot rest row by row."""


@dataclass(frozen=True)
class Settled:
    """How a request is answered: its routing, the lane its rows are in, and what they hold there."""

    routed: Routed
    lane: Lane
    held: Held | None


class ServedModel:
    """The model and what may be asked of it.

    Args:
        model: of a finished run, in evaluation mode.
        tokenizer: of its base.
        method: of the run.
        decision: how experts are settled; the run's own by default.

    Raises:
        ConfigError: the method cannot be served, or there is nothing to decide.
    """

    def __init__(self, model: Any, tokenizer: Any, method: Method, *, decision: str | None = None) -> None:
        if method.tuner not in ("loramix", "none"):
            raise ConfigError(
                f"method {method.name} keeps its training in a key-value prefix that every row would have to begin "
                "with; loramix serves methods made of experts, and full fine-tuning. Use transformers for this run."
            )
        if decision is not None and method.settled_by != "prompt":
            raise ConfigError(
                f"--decision {decision}: method {method.name} settles no expert for a prompt. Leave it out."
            )
        self.model, self.tokenizer, self.method, self.decision = model, tokenizer, method, decision
        self.settled_by = method.settled_by
        mixture = self._guide.active() if method.tuner == "loramix" else None
        self._scopes = () if mixture is None else mixture.scopes
        if decision is not None:
            if decision == "pinned" or (problem := decision_problem(decision)):
                said = problem if decision != "pinned" else 'decision = "pinned": name experts in requests instead.'
                raise ConfigError(f"--decision: {said}")
            last_scope_needed(decision, self._scopes)
        self.experts: tuple[str, ...] = ()
        if mixture is not None and self.settled_by != "nothing":
            self.experts = tuple(mixture.labels if self.settled_by == "domain" else mixture.config.experts or ())
        self.has_base = method.tuner == "loramix"
        self.device: torch.device = next(model.parameters()).device
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends = {
            one for one in [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id] if one is not None
        }
        self.most_tokens = int(getattr(model.config, "max_position_embeddings", None) or 2048)

    @property
    def _guide(self) -> Any:
        return self.model.base_model.guide

    def pinned(self, expert: str) -> Settled:
        """Returns how a request is answered that names its expert, or the base."""
        told = dict(pinned_route(expert, self.experts).probabilities)
        if expert == BASE and self.settled_by != "prompt":
            return Settled(Routed(BASE, "pinned", told), "base", None)
        position = -1 if expert == BASE else self.experts.index(expert)
        decision = "told" if self.settled_by == "domain" else "pinned"
        return Settled(Routed(expert, decision, told), "mixture", position)

    @torch.inference_mode()
    def settle(self, asks: Sequence[Ask]) -> list[Settled]:
        """Returns how each request is answered. Those to be routed are read together.

        Raises:
            EngineError: a request names no domain to a method that is told it, or wants what was not calibrated.
        """
        settled: dict[int, Settled] = {}
        groups: dict[Wish, list[int]] = {}
        for place, ask in enumerate(asks):
            among = None if ask.allowed is None else tuple(name for name in self.experts if name in ask.allowed)
            if ask.expert is not None:
                settled[place] = self.pinned(ask.expert)
            elif self.settled_by == "domain":
                raise EngineError(f"This model is told the domain: ask for one of {', '.join(self.experts)}.", 400)
            elif self.settled_by == "nothing":
                settled[place] = Settled(Routed(None, "token", {}), "mixture", None)
            elif among == ():
                settled[place] = self.pinned(BASE)
            else:
                may_rest = ask.allowed is None or BASE in ask.allowed
                wish = Wish(self.decision, abstain=ask.abstain if may_rest else False, allowed=among)
                groups.setdefault(wish, []).append(place)
        for wish, places in groups.items():
            settled.update(zip(places, self._routed([asks[place] for place in places], wish), strict=True))
        return [settled[place] for place in range(len(asks))]

    def _routed(self, asks: Sequence[Ask], wish: Wish) -> list[Settled]:
        ids_BT, mask_BT = padded([ask.prompt_ids for ask in asks], self.device)
        try:
            routes, held = settle_prompts(self._guide, ids_BT, {"attention_mask": mask_BT}, wish)
        except ConfigError as error:
            raise EngineError(str(error), 400) from error
        return [Settled(_said(route), "mixture", row) for route, row in zip(routes, rows_held(held), strict=True)]

    @contextmanager
    def holding(self, lane: Lane, rows: Sequence[Held | None]) -> Iterator[None]:
        """Holds the experts of the rows of the forwards inside."""
        held = [row for row in rows if row is not None]
        if lane == "base":
            with self.model.disable_adapter():
                yield
        elif held:
            with self._guide.settled(held_together(held, self._scopes, self.device)):
                yield
        else:
            with nullcontext():
                yield

    def prefill(self, prompts: Sequence[Sequence[int]], lane: Lane, held: Sequence[Held | None]) -> tuple[Any, Tensor]:
        """Returns the key-value cache of some prompts, left-padded, and the logits of what comes next, (B, V)."""
        ids_BT, mask_BT = padded(prompts, self.device)
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache()
        with self.holding(lane, held):
            output = self.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return cache, output.logits[:, -1]

    def step(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        mask_BC: Tensor,
        cache: Any,
        lane: Lane,
        held: Sequence[Held | None],
    ) -> Tensor:
        """Returns the logits behind one more token of each row, (B, V)."""
        with self.holding(lane, held):
            output = self.model(
                input_ids=torch.tensor(tokens, device=self.device)[:, None],
                attention_mask=mask_BC,
                position_ids=torch.tensor(positions, device=self.device)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
        return output.logits[:, -1]


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns prompts left-padded to one width, and their mask, int64 (B, T) both."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _said(route: Route) -> Routed:
    return Routed(route.expert, route.decision, dict(route.probabilities), route.score, route.threshold)
