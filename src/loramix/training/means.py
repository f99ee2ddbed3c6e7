"""What the language losses of a step's rows are divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StepMean:
    """One mean over all supervised tokens of a step, in all processes."""

    def __init__(self) -> None:
        self._tokens: Tensor = torch.ones(())

    def begin(self, batches: Sequence[dict[str, Any]], tokens: Tensor) -> None:
        """Takes the micro-batches of a step, and its supervised tokens over all processes."""
        self._tokens = tokens

    def of(self, nll_B: Tensor, domain_ids_B: Tensor) -> Tensor:
        """Returns these rows' part of the step's loss.

        Args:
            nll_B: sum of negative log-likelihoods of each row.
            domain_ids_B: their domains.
        """
        return nll_B.sum() / self._tokens

    def shown(self, loss: Tensor) -> Tensor:
        """Returns a part of the step's loss as the log has it."""
        return loss


class DomainMeans:
    """A mean for each domain over its own supervised tokens, and their sum: where every domain has weights of its own,
    each gets the gradient that it would get alone. One process.

    Args:
        domains: how many there are.
    """

    def __init__(self, domains: int) -> None:
        self._tokens_D = torch.ones(domains)
        self._taking_part = domains

    def begin(self, batches: Sequence[dict[str, Any]], tokens: Tensor) -> None:
        """Takes the micro-batches of a step; see `StepMean`."""
        counts_D = torch.zeros_like(self._tokens_D)
        for batch in batches:
            domains_M = batch["domain_ids"][batch["supervised_rows"]].cpu()
            counts_D += torch.bincount(domains_M, minlength=len(counts_D))
        self._taking_part = int((counts_D > 0).sum())
        self._tokens_D = counts_D.clamp(min=1)

    def of(self, nll_B: Tensor, domain_ids_B: Tensor) -> Tensor:
        """Returns these rows' part of the step's loss; see `StepMean`."""
        return (nll_B / self._tokens_D.to(nll_B.device)[domain_ids_B]).sum()

    def shown(self, loss: Tensor) -> Tensor:
        """Returns a part of the step's loss as the log has it: the mean of the domains that take part."""
        return loss / self._taking_part
