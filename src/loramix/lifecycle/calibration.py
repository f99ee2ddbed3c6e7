"""Calibrates a routed model to tell prompts that no expert fits: in the loaded model, from examples of its domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loramix.data.collation import Example
from loramix.errors import ConfigError, DataError, Problems
from loramix.methods import method_named
from loramix.routers.abstention import DIMS, KIND, AbstentionConfig, fitted, threshold_for
from loramix.training.prompt_states import prompt_states
from loramix.tuner.abstaining import put
from loramix.tuner.decisions import last_scope_needed
from loramix.tuner.guide import ForwardGuide
from loramix.tuner.mixture import Mixture

Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        config: as it stands in the adapter now.
        door: the module whose router holds its tensors.
        train, held: by domain, what that router reads of the prompts, fp32 (N, I).
        scores: by domain, the held-out prompts' scores, (N,).
    """

    config: AbstentionConfig
    door: str
    train: dict[str, Tensor]
    held: dict[str, Tensor]
    scores: dict[str, Tensor]

    def inside(self) -> Tensor:
        """Returns the scores of all held-out prompts, (N,)."""
        return torch.cat(list(self.scores.values()))


def calibrate(model: Any, train: Examples, held: Examples, *, pad_token_id: int, keep: float = 0.95) -> Calibration:
    """Fits abstention to a model's own domains and writes it into the active adapter, in place of an earlier one.

    It looks at what the deciding router reads: the last one's, or that of layer k under "layer:k", so that asking costs
    no further reading. Saving the model saves it.

    Args:
        model: a PeftModel with a sequence-routed adapter whose routers read the base.
        train: examples of each expert's domain, in the order of the experts; the domains' means and spread.
        held: held-out examples of the same domains; the threshold.
        pad_token_id: of the base.
        keep: the share of held-out prompts that still gets an expert, above 0 and up to 1.

    Raises:
        ConfigError: the adapter cannot be calibrated, or `keep` is no such share.
        DataError: a domain is missing, or has no examples.
    """
    mixture = ForwardGuide.of(model.get_base_model()).active()
    _check(mixture, train, held, keep)
    assert mixture is not None
    decision = str(mixture.config.decision)
    layer = last_scope_needed(decision if decision.startswith("layer:") else "last", mixture.scopes)
    read = {
        name: {domain: states(model, some, layer, pad_token_id=pad_token_id) for domain, some in examples.items()}
        for name, examples in (("train", train), ("held", held))
    }
    labels_N = torch.cat([torch.full((len(part),), e) for e, part in enumerate(read["train"].values())])
    part = fitted(torch.cat(list(read["train"].values())), labels_N, len(train), DIMS)
    scores = {domain: part.scores(states_NI) for domain, states_NI in read["held"].items()}
    threshold = threshold_for(torch.cat(list(scores.values())), keep)
    dims = part.means_ED.shape[1]
    config = AbstentionConfig(kind=KIND, layer=layer, dims=dims, threshold=threshold, keep=float(keep))
    put(mixture, config, part)
    return Calibration(config, mixture.doors[layer].name, read["train"], read["held"], scores)


def states(model: Any, examples: Sequence[Example], layer: str, *, pad_token_id: int) -> Tensor:
    """Returns what the router of one layer reads of each example's prompt, fp32 (N, I), in the order given.

    Args:
        model: a PeftModel with a sequence-routed adapter whose routers read the base.
        examples: any; only their prompts are read.
        layer: a scope.
        pad_token_id: of the base.
    """
    prompts = [(e.encoded.input_ids[: e.encoded.prompt_length], 0) for e in examples]
    return prompt_states(model, prompts, pad_token_id=pad_token_id)[layer]


def problem(mixture: Mixture | None) -> str | None:
    """Returns why an adapter cannot be calibrated, or None."""
    if mixture is None or not mixture.doors or method_named(mixture.config.method).settled_by != "prompt":
        name = "without a routed adapter" if mixture is None else f"of method {mixture.config.method}"
        return f"a model {name} sends no prompt to an expert, so there is none to keep from it. Calibrate moa."
    if not mixture.reads_base:
        return (
            "the routers read the running model (router.reads = 'experts'), whose states depend on the experts chosen "
            "below. Train with router.reads = 'base' to calibrate."
        )
    return None


def _check(mixture: Mixture | None, train: Examples, held: Examples, keep: float) -> None:
    if wrong := problem(mixture):
        raise ConfigError(wrong)
    assert mixture is not None
    if not 0 < keep <= 1:
        raise ConfigError(f"keep = {keep}: expected a share above 0, up to 1. Common is 0.95.")
    experts = list(mixture.config.experts or [])
    problems = Problems("the examples to calibrate with")
    for name, part in (("training", train), ("held-out", held)):
        if list(part) != experts:
            problems.add(
                f"{name} examples of {', '.join(part) or 'nothing'}, the model's experts are {', '.join(experts)}. "
                "Expected the same, in the same order."
            )
        for domain, some in part.items():
            if not some:
                problems.add(f"domain {domain!r} has no {name} example. Add some.")
    problems.raise_as(DataError)
