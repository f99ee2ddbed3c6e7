"""Sums between two log lines, by domain and by loss, kept on the device so that no step waits for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FIELDS = ("nll", "tokens", "correct", "decided")


class DomainTally:
    """Adds up what was learned and routed and gives it out as log entries."""

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = list(domains)
        self.sums: Tensor | None = None
        self.auxiliary: dict[str, tuple[Tensor, int]] = {}

    def add(self, domain_ids_B: Tensor, **values: Tensor) -> None:
        """Adds values of the rows of a batch, each (B,), under names in FIELDS. Rows with one that is not finite are
        left out."""
        if self.sums is None:
            self.sums = torch.zeros(len(self.domains), len(FIELDS), device=domain_ids_B.device)
        columns = [
            values[f].detach().float() if f in values else torch.zeros_like(domain_ids_B).float() for f in FIELDS
        ]
        values_BF = torch.stack(columns, dim=1)
        finite_B = torch.isfinite(values_BF).all(dim=1, keepdim=True)
        self.sums.index_add_(0, domain_ids_B, torch.where(finite_B, values_BF, 0.0))

    def add_auxiliary(self, name: str, value: Tensor) -> None:
        """Adds the value of an auxiliary loss in one micro-batch, before its weight."""
        total, count = self.auxiliary.get(name, (torch.zeros_like(value.detach()), 0))
        self.auxiliary[name] = (total + value.detach().nan_to_num(0.0, 0.0, 0.0), count + 1)

    def state(self) -> dict[str, Any]:
        """Returns the sums as JSON."""
        return {
            "sums": None if self.sums is None else self.sums.tolist(),
            "auxiliary": {name: [float(total), count] for name, (total, count) in self.auxiliary.items()},
        }

    def set_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Puts back what `state` returned."""
        self.sums = None if state["sums"] is None else torch.tensor(state["sums"], device=device)
        self.auxiliary = {
            name: (torch.tensor(total, device=device), count) for name, (total, count) in state["auxiliary"].items()
        }

    def copy(self) -> DomainTally:
        """Returns a tally with the same sums."""
        twin = DomainTally(self.domains)
        twin.sums, twin.auxiliary = None if self.sums is None else self.sums.clone(), dict(self.auxiliary)
        return twin

    def join(self, total: Callable[[Tensor], Tensor]) -> None:
        """Makes the sums those of all processes.

        Args:
            total: returns the sum of a tensor over processes; all call it with the same shapes in the same order.
        """
        if self.sums is not None:
            self.sums = total(self.sums)
        for name, (value, count) in sorted(self.auxiliary.items()):
            both = total(torch.stack([value, torch.full_like(value, count)]))
            self.auxiliary[name] = (both[0], int(both[1]))

    def drain(self) -> dict[str, float]:
        """Returns loss/<domain>, router_accuracy/<domain> and auxiliary/<loss> since the last time, and starts anew.
        Domains that had no rows are left out."""
        entries: dict[str, float] = {}
        if self.sums is not None:
            for domain, row in zip(self.domains, self.sums.tolist(), strict=True):
                nll, tokens, correct, decided = row
                if tokens:
                    entries[f"loss/{domain}"] = nll / tokens
                if decided:
                    entries[f"router_accuracy/{domain}"] = correct / decided
        for name, (total, count) in self.auxiliary.items():
            entries[f"auxiliary/{name}"] = float(total) / count
        self.sums, self.auxiliary = None, {}
        return entries
