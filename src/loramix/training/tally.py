"""Sums per domain between two log lines, kept on the device so that no step waits for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FIELDS = ("nll", "tokens", "routing", "correct", "decided", "rows")


class DomainTally:
    """Adds up what was learned and routed, by domain, and gives it out as log entries."""

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = list(domains)
        self.sums: Tensor | None = None

    def add(self, domain_ids_B: Tensor, **values: Tensor) -> None:
        """Adds values of the rows of a batch, each (B,), under names in FIELDS."""
        if self.sums is None:
            self.sums = torch.zeros(len(self.domains), len(FIELDS), device=domain_ids_B.device)
        columns = [
            values[f].detach().float() if f in values else torch.zeros_like(domain_ids_B).float() for f in FIELDS
        ]
        self.sums.index_add_(0, domain_ids_B, torch.stack(columns, dim=1))

    def drain(self) -> dict[str, float]:
        """Returns loss/<domain>, routing_loss/<domain> and router_accuracy/<domain> since the last time, and starts
        anew. Domains that had no rows are left out."""
        if self.sums is None:
            return {}
        entries: dict[str, float] = {}
        for domain, row in zip(self.domains, self.sums.tolist(), strict=True):
            nll, tokens, routing, correct, decided, rows = row
            if tokens:
                entries[f"loss/{domain}"] = nll / tokens
            if decided:
                entries[f"routing_loss/{domain}"] = routing / rows
                entries[f"router_accuracy/{domain}"] = correct / decided
        self.sums = None
        return entries
