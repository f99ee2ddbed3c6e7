"""A LoRA folded into the base's weights: a model that needs neither PEFT nor loramix, exact up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramix.adapters.lora import Lora
from loramix.errors import ModelError, Problems
from loramix.experts import linear_sizes
from loramix.experts.fold import delta, fold_problem, summed
from loramix.lifecycle.weighted_sum import Deviation, deviation_of

TEXTS = (
    "What is a stock split?",
    "Which vitamin is made in the skin?",
    "Tom has 3 apples and buys 4 more. How many has he?",
    "Give the weather in Bergen as a function call.",
)
"""What logits are compared on where a run keeps no prompts."""
MOST_TOKENS = 64
"""Of a prompt that logits are compared on: a row of logits is as wide as the vocabulary."""


@torch.no_grad()
def fold_in(base: Any, lora: Lora) -> tuple[Deviation, float]:
    """Adds a LoRA to the weights of its base, in place.

    Each sum is made in fp64 and rounded once, to the base's type.

    Args:
        base: the transformers model.
        lora: for it.

    Returns:
        what rounding changed, relative to the LoRA's delta; and relative to the weights of the modules it is on. In
        half precision the first may be large while the second is as small as for any weight.

    Raises:
        ModelError: a module is missing, of another size, quantised, or shares its weights with another; all at once.
    """
    modules = dict(base.named_modules())
    problems = Problems("the base's modules")
    shared = _shared(base)
    for name, (down_RI, up_OR) in lora.modules.items():
        layer = modules.get(name)
        sizes = (down_RI.shape[1], up_OR.shape[0])
        if layer is None:
            problems.add(f"{name}: is not in the base. The expert is for another base.")
        elif problem := fold_problem(layer):
            problems.add(f"{name} {problem}")
        elif linear_sizes(layer) != sizes:
            problems.add(f"{name}: has (in, out) features {linear_sizes(layer)}, the expert {sizes}.")
        elif other := shared.get(f"{name}.weight"):
            problems.add(f"{name}: shares its weights with {other}, which would change too. Untie them first.")
    problems.raise_as(ModelError)
    distances, sizes_of_delta, whole = {}, {}, 0.0
    for name, (down_RI, up_OR) in lora.modules.items():
        layer = modules[name]
        change_OI = delta(down_RI.double(), up_OR.double(), lora.scalings[name])
        exact = summed(layer, change_OI)
        layer.weight.data = exact.to(layer.weight.dtype)
        distances[name] = float(torch.linalg.matrix_norm(layer.weight.double() - exact))
        sizes_of_delta[name] = float(torch.linalg.matrix_norm(change_OI))
        whole += float(exact.square().sum())
    to_weights = sum(d**2 for d in distances.values()) ** 0.5 / whole**0.5
    return deviation_of(distances, sizes_of_delta), to_weights


def _shared(base: nn.Module) -> dict[str, str]:
    """Returns, for each parameter that is another one's too, the other's name."""
    owners: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {n: next(o for o in names if o != n) for names in owners.values() if len(names) > 1 for n in names}


@dataclass(frozen=True)
class Agreement:
    """How alike two models answer.

    Attributes:
        largest_difference: of two logits.
        largest_logit: of the first model, to compare it with.
        same_next_token: share of positions at which both find the same token likeliest.
        tokens: positions compared.
    """

    largest_difference: float
    largest_logit: float
    same_next_token: float
    tokens: int


@torch.no_grad()
def logits_on(model: Any, prompts: Sequence[Sequence[int]], **told: Tensor) -> list[Tensor]:
    """Returns the logits (T, V) of each prompt, in fp32.

    Args:
        model: any causal language model.
        prompts: token ids; their first MOST_TOKENS are read.
        told: what the model is told beside, the same for each prompt.
    """
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt[:MOST_TOKENS])], device=model.device)
        found.append(model(input_ids=ids, **told).logits[0].float().cpu())
    return found


def agreement(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Agreement:
    """Returns how alike the logits of two models are, prompt by prompt."""
    pairs = list(zip(wanted, found, strict=True))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    tokens = sum(len(a) for a in wanted)
    return Agreement(
        largest_difference=max(float((a - b).abs().max()) for a, b in pairs),
        largest_logit=max(float(a.abs().max()) for a in wanted),
        same_next_token=same / tokens,
        tokens=tokens,
    )
