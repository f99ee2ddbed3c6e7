"""The search of LoRAHub: a handful of weights from a handful of examples, without gradients.

Huang et al. 2023 (arXiv:2307.13269, section 3.3): minimise the mean loss of a few examples plus 0.05 mean |w|, with
Nevergrad's NGOpt, the weights starting at 0 and kept within [-1.5, 1.5].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from loramix.errors import ConfigError
from loramix.methods.base import FewShotSearch


def few_shot_objective(mean_loss: float, weights_E: Tensor, l1: float) -> float:
    """Returns what the search minimises: the mean loss plus `l1` times the mean absolute weight."""
    return mean_loss + l1 * float(weights_E.detach().abs().mean())


def search_weights(
    weights_E: Tensor,
    loss_of_examples: Callable[[], float],
    search: FewShotSearch,
    *,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Finds the weights and leaves the best in `weights_E`.

    Args:
        weights_E: the constant router's parameter, (E,); changed in place.
        loss_of_examples: returns the mean loss of the few examples under the weights as they are.
        search: budget, bounds and penalty.
        seed: of the optimizer.
        console: where progress is shown.

    Returns:
        evaluations, the objective at the start (the bare base) and at the best, and the weights found.

    Raises:
        ConfigError: nevergrad is not installed.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise ConfigError(
            "method lorahub searches with nevergrad. Install it: pip install 'loramix[search]'."
        ) from error

    def objective(values: np.ndarray) -> float:
        with torch.no_grad():
            weights_E.copy_(torch.as_tensor(values, dtype=weights_E.dtype))
        return few_shot_objective(loss_of_examples(), weights_E, search.l1)

    start = np.zeros(len(weights_E))
    found = nevergrad.p.Array(init=start, lower=[-search.bound] * len(start), upper=[search.bound] * len(start))
    optimizer = nevergrad.optimizers.NGOpt(parametrization=found, budget=search.budget)
    optimizer.parametrization.random_state.seed(seed)
    at_start = best = objective(start)
    best_weights = start
    for number in range(search.budget):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NGOpt's own choice of a sub-optimizer warns of its settings
            asked = optimizer.ask()
        value = objective(asked.value)
        optimizer.tell(asked, value)
        if value < best:
            best, best_weights = value, np.array(asked.value)
        if (number + 1) % 10 == 0:
            console.print(f"lorahub: {number + 1}/{search.budget} tried, objective {best:.4f}", highlight=False)
    with torch.no_grad():
        weights_E.copy_(torch.as_tensor(best_weights, dtype=weights_E.dtype))
    return {
        "evaluations": search.budget + 1,
        "objective_at_start": round(at_start, 6),
        "objective": round(best, 6),
        "weights": [round(float(w), 6) for w in best_weights],
    }
