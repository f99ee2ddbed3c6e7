"""The language loss of a micro-batch by row: at supervised tokens only, without logits where the head allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loramix.losses import head_nll, next_token_nll
from loramix.models.head import head_can_choose, logits_at
from loramix.models.last_states import agrees, last_states, plain_head


class SupervisedLoss:
    """Sums of negative log-likelihoods by row.

    Where the head is an ordinary frozen linear, its loss is worked out `chunk` rows at a time. In the first micro-batch
    that is checked against the model's own logits at one position: a model that does something more to them (soft
    caps, scales) is asked for logits from then on.

    Args:
        model: a base or PeftModel, not wrapped.
        chunk: rows of the head at a time; 0 asks for logits always.
    """

    def __init__(self, model: nn.Module, chunk: int) -> None:
        self._model, self._chunk = model, chunk
        self._can_choose = head_can_choose(model)
        self._head = plain_head(model) if chunk else None
        self._checked = False

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns (sum of nll, number of supervised tokens) of each row, fp32 and int64 (B,).

        Args:
            model: the model as it is called: perhaps wrapped for data parallelism.
            inputs: of its forward.
            batch: labels, positions and what is supervised, as `Collator` or `PaddingFreeCollator` gives them.
        """
        labels_BT, rows_N = batch["labels"], batch["supervised_rows"]
        no_tokens_B = torch.zeros_like(batch["domain_ids"])
        tokens_B = no_tokens_B.index_add(0, rows_N, torch.ones_like(rows_N))
        if self._head is not None:
            asked = batch["positions"][:1] if not self._checked else batch["positions"][:0]
            with last_states(self._model) as seen:
                logits_B1V = logits_at(model, asked, can_choose=True, **inputs)
            states_BTH = seen[-1]
            if self._checked or agrees(logits_B1V[:, 0], states_BTH[:, asked[0]], self._head):
                self._checked = True
                nll_N = self._nll(states_BTH, labels_BT, batch["supervised"])
                return torch.zeros_like(no_tokens_B, dtype=nll_N.dtype).index_add(0, rows_N, nll_N), tokens_B
            self._head = None
        logits_BPV = logits_at(model, batch["positions"], can_choose=self._can_choose, **inputs)
        nll_BP, _ = next_token_nll(logits_BPV, labels_BT, batch["positions"])
        if len(labels_BT) == len(tokens_B):
            return nll_BP.sum(dim=1), tokens_B
        # One long row of several: each position is one row's.
        return torch.zeros_like(no_tokens_B, dtype=nll_BP.dtype).index_add(0, rows_N, nll_BP[0]), tokens_B

    def _nll(self, states_BTH: Tensor, labels_BT: Tensor, supervised_N: Tensor) -> Tensor:
        assert self._head is not None
        states_NH = states_BTH.flatten(0, 1)[supervised_N]
        head: Any = self._head
        return head_nll(states_NH, head.weight, head.bias, labels_BT.flatten()[supervised_N + 1], self._chunk)
