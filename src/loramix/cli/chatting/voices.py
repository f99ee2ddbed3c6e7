"""Who can answer: the choice a method leaves, one class for each thing that experts follow from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from loramix.errors import ConfigError, did_you_mean
from loramix.methods import Method
from loramix.tuner.abstaining import BASE, calibration_of
from loramix.tuner.routes import Route

AUTO = "auto"
"""What stands for "as the run itself answers" where an expert is named."""


@dataclass(frozen=True)
class Voice:
    """Who answers one prompt.

    Attributes:
        label: what is shown before the answer; may be empty.
        told: what `generate` is told of it.
        expert: its name; None where the method settles none.
        probability: what the router gave it; None where none was asked, or none fits.
        alone: whether the base answers with the adapter switched off.
    """

    label: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    expert: str | None = None
    probability: float | None = None
    alone: bool = False


class Voices(Protocol):
    """Whom a run lets one choose among. A choice is a name, or None for what the run itself does.

    Attributes:
        itself: what answers are called that nobody chose.
        chosen: who answers until another is chosen.
    """

    itself: str
    chosen: str | None

    def named(self, name: str) -> str | None:
        """Returns the choice that a name to be pinned stands for, or raises a ConfigError with the reason."""
        ...

    def compared(self, names: Sequence[str]) -> list[str | None]:
        """Returns the choices to compare, by default the run itself and the base, or raises a ConfigError."""
        ...

    def listed(self) -> list[str]:
        """Returns the names that may be pinned, or raises a ConfigError with the reason why none may."""
        ...

    def voice(self, batch: Mapping[str, Any], choice: str | None) -> Voice:
        """Returns who answers a prompt (one row of input_ids and attention_mask)."""
        ...


def voices_of(model: Any, method: Method, expert: str | None, abstain: bool | None) -> Voices:
    """Returns whom a run lets one choose among.

    Args:
        model: of the run.
        method: of the run.
        expert: whom the user chose at the start.
        abstain: leave prompts that no expert fits to the base; None for as the run is calibrated.

    Raises:
        ConfigError: the choice is none that the method has.
    """
    if abstain and method.settled_by != "prompt":
        raise ConfigError(f"--abstain: method {method.name} settles no expert for a prompt. Leave it out.")
    if method.settled_by == "prompt":
        return Routed(model, method, expert, abstain)
    if method.settled_by == "domain":
        return Told(model, method, expert)
    if expert is not None:
        raise ConfigError(f"--expert {expert}: this method pins no expert. Leave it out.")
    return Unsettled(model, method)


class Routed:
    """A method whose routers settle one expert for the prompt, unless the user pins one."""

    def __init__(self, model: Any, method: Method, expert: str | None, abstain: bool | None) -> None:
        self._model, self._abstain = model, abstain
        self._names = [*model.experts, BASE]
        self.itself = method.name
        self.chosen = None if expert is None else _known(expert, self._names, f"--expert {expert}: ")
        if abstain:
            if expert is not None:
                raise ConfigError(f"--abstain and --expert {expert} contradict each other. Pass one.")
            calibration_of(model.guide.active(), abstain)  # refuses where there is none

    def named(self, name: str) -> str | None:
        return None if name == AUTO else _known(name, [*self._names, AUTO])

    def compared(self, names: Sequence[str]) -> list[str | None]:
        return [self.named(name) for name in names] or [None, BASE]

    def listed(self) -> list[str]:
        return list(self._names)

    def voice(self, batch: Mapping[str, Any], choice: str | None) -> Voice:
        if choice is not None:
            return Voice(f"[{choice}] ", {"expert": choice}, choice)
        route = self.route(batch)
        told: dict[str, Any] = {"expert": route.expert}
        if route.decision == "per_layer":  # no single expert answers: each layer follows its own router
            told = {"decision": route.decision, "abstain": self._abstain}
        return Voice(_label(route), told, route.expert, route.probability)

    def route(self, batch: Mapping[str, Any]) -> Route:
        """Returns what the routers say of a prompt, whoever is pinned."""
        return self._model.route(**batch, abstain=self._abstain)[0]


class Told:
    """A method that is told the domain: the user says which one."""

    def __init__(self, model: Any, method: Method, expert: str | None) -> None:
        self._model = model
        self._domains = list(model.peft_config["default"].domains)
        self.itself = method.name
        if expert not in self._domains:
            said = "is missing" if expert is None else f"{expert} is no domain of it"
            raise ConfigError(
                f"--expert {said}: this method is told the domain. Expected one of {', '.join(self._domains)}."
            )
        self.chosen: str | None = expert

    def named(self, name: str) -> str | None:
        if name == AUTO:
            raise ConfigError("nothing is routed here: this method is told the domain. Name one of its domains.")
        return _known(name, self._domains)

    def compared(self, names: Sequence[str]) -> list[str | None]:
        return [_known(name, [*self._domains, BASE]) for name in names] or [self.chosen, BASE]

    def listed(self) -> list[str]:
        return list(self._domains)

    def voice(self, batch: Mapping[str, Any], choice: str | None) -> Voice:
        if choice == BASE:
            return Voice(expert=BASE, alone=True)
        ids = torch.tensor([self._domains.index(str(choice))], device=self._model.device)
        return Voice(told={"domain_ids": ids}, expert=choice)


class Unsettled:
    """A method in which no expert can be chosen: one LoRA, routers by token, a trained base."""

    chosen: str | None = None

    def __init__(self, model: Any, method: Method) -> None:
        self._model = model
        self.itself = method.name

    def named(self, name: str) -> str | None:
        raise ConfigError(self._why())

    def compared(self, names: Sequence[str]) -> list[str | None]:
        if not hasattr(self._model, "disable_adapter"):
            raise ConfigError(f"method {self.itself} trains the base itself, so no base is left to compare with.")
        for name in names:
            if name not in (AUTO, BASE):
                raise ConfigError(f"{name}: {self._why()} /compare alone compares it with the base.")
        return [None if name == AUTO else BASE for name in names] or [None, BASE]

    def listed(self) -> list[str]:
        raise ConfigError(self._why())

    def voice(self, batch: Mapping[str, Any], choice: str | None) -> Voice:
        return Voice(expert=choice, alone=choice == BASE)

    def _why(self) -> str:
        return f"method {self.itself} settles no expert for a prompt, so none can be pinned."


@contextmanager
def speaking(model: Any, voice: Voice) -> Iterator[None]:
    """Switches the adapter off inside, if the base is to answer alone."""
    off: AbstractContextManager[Any] = model.disable_adapter() if voice.alone else nullcontext()
    with off:
        yield


def _known(name: str, names: Sequence[str], said: str = "") -> str:
    if name not in names:
        said = said or f"{name}: "
        raise ConfigError(f"{said}no such expert. Expected one of {', '.join(names)}.{did_you_mean(name, names)}")
    return name


def _label(route: Route) -> str:
    if route.probability is not None:
        return f"[{route.expert} {route.probability:.0%}] "
    if route.score is None or route.threshold is None:
        return f"[{route.expert}] "
    return f"[{route.expert}: no expert fits, score {route.score:.2f} > {route.threshold:.2f}] "
