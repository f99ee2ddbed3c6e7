"""Carries the domain column through somebody else's collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from loramix.errors import ConfigError, DataError, Problems, did_you_mean


class DomainCollator:
    """Takes the domain out of each row, lets another collator make the batch, and puts `domain_ids` beside it.

    For trainers that do not know of domains: `transformers.Trainer` and TRL's with `remove_unused_columns=False`, so
    that the column gets here.

    Args:
        inner: makes a batch of the rest: TRL's, transformers' or your own.
        domains: names in the order of the adapter's experts.
        column: the rows' column with the domain, as a name or a position.
    """

    def __init__(
        self,
        inner: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        domains: Sequence[str],
        column: str = "domain",
    ) -> None:
        self.inner = inner
        self.domains = list(domains)
        self.column = column

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the inner collator's batch with domain_ids, int64 (B,).

        Raises:
            DataError: a row without a domain, or with one that is not among the experts; all at once.
            ConfigError: the inner collator put several rows into one sequence and does not say where they end.
        """
        problems = Problems("the batch's domains")
        ids = [self._id(row.get(self.column), problems) for row in rows]
        problems.raise_as(DataError)
        batch = dict(self.inner([{k: v for k, v in row.items() if k != self.column} for row in rows]))
        if (made := _rows_in(batch)) != len(rows):
            raise ConfigError(
                f"the collator made {made} sequences of {len(rows)} rows, but a sequence has one domain. Turn packing "
                "off; rows one after the other need their borders (cu_seq_lens_q) or positions that begin anew."
            )
        batch["domain_ids"] = torch.tensor(ids, dtype=torch.int64)
        return batch

    def _id(self, domain: Any, problems: Problems) -> int:
        if isinstance(domain, int) and not isinstance(domain, bool) and 0 <= domain < len(self.domains):
            return domain
        if domain in self.domains:
            return self.domains.index(domain)
        near = did_you_mean(str(domain), self.domains)
        problems.add(f"{self.column} = {domain!r}: expected one of {', '.join(self.domains)}.{near}")
        return 0


def _rows_in(batch: Mapping[str, Any]) -> int:
    """Returns how many rows a batch has: those of its first dimension, or those that lie one after the other in one."""
    if len(batch["input_ids"]) == 1:
        if (borders := batch.get("cu_seq_lens_q")) is not None:
            return len(borders) - 1
        if (positions := batch.get("position_ids")) is not None and batch.get("attention_mask") is None:
            return int((torch.as_tensor(positions).diff() != 1).sum()) + 1
    return len(batch["input_ids"])
