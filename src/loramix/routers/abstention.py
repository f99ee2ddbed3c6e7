"""When no expert fits: how far a prompt lies from every domain that the experts learned.

Relative Mahalanobis distance (Ren et al., A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, 2021,
section 3) of what the router of one layer reads of the prompt: to the nearest domain, less the distance to all training
prompts taken together. What makes a prompt unusual among all prompts alike (its length, its language) so counts little;
what sets it apart from each domain counts.

    z = (x - c) W,    score(x) = (min_e |z - m_e|^2 - sum_d b_d z_d^2) / D

W (I, D) takes the D principal directions of the training prompts and turns and scales them so that prompts spread
around their domain's mean with covariance 1, and all together with covariance diag(1 / b). A prompt whose score is
above the threshold is answered by the base alone. The score, its layer and D were chosen by measuring:
docs/abstention.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from loramix.routers.base import Site

KIND = "relative_mahalanobis"
DIMS = 64
MOST_DIMS = 1 << 14
"""A file cannot make us take more memory than a model of this width would need."""
SHRINK = 0.1
"""Share of a covariance that is replaced by a multiple of the identity: some hundred prompts estimate it poorly."""


@dataclass(frozen=True, kw_only=True)
class AbstentionConfig:
    """A calibration as adapter_config.json holds it."""

    kind: str
    layer: str
    """The scope whose router's reading is looked at, "layers.12" for example."""
    dims: int
    """D."""
    threshold: float
    """A prompt of a higher score is the base's."""
    keep: float
    """The share of held-out prompts that the threshold was set to keep."""

    def problems(self) -> list[str]:
        """Returns what is wrong with the values; they come from a file."""
        found = []
        kind, layer, dims, threshold, keep = (cast(Any, value) for value in astuple(self))
        if kind != KIND:
            found.append(f"abstention.kind = {kind!r}: expected {KIND!r}. Calibrate the adapter anew.")
        if not isinstance(layer, str):
            found.append(f"abstention.layer = {layer!r}: expected the name of a layer with a router.")
        if not isinstance(dims, int) or not 1 <= dims <= MOST_DIMS:
            found.append(f"abstention.dims = {dims!r}: expected a whole number from 1 to {MOST_DIMS}.")
        if not isinstance(threshold, float | int) or not math.isfinite(threshold):
            found.append(f"abstention.threshold = {threshold!r}: expected a number.")
        if not isinstance(keep, float | int) or not 0 < keep <= 1:
            found.append(f"abstention.keep = {keep!r}: expected a share above 0, up to 1.")
        return found

    def build(self, site: Site) -> Abstention:
        """Returns the part for a router, to be filled from a file."""
        return Abstention(site.inputs, self.dims, site.experts)


class Abstention(nn.Module):
    """Scores prompts; a part of the router that reads them.

    Buffers, not parameters: nothing trains them, and no optimizer or freezing may meet them. They stay fp32 in a model
    of 16 bits, whose rounding would move scores against the threshold.
    """

    center_I: Tensor
    whiten_ID: Tensor
    means_ED: Tensor
    background_D: Tensor

    def __init__(self, in_features: int, dims: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("center_I", torch.zeros(in_features))
        self.register_buffer("whiten_ID", torch.zeros(in_features, dims))
        self.register_buffer("means_ED", torch.zeros(num_experts, dims))
        self.register_buffer("background_D", torch.zeros(dims))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Abstention:
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def scores(self, pooled_BI: Tensor) -> Tensor:
        """Returns how far each prompt is from the nearest domain, fp32 (B,); below 0 for most of a domain's own.

        Args:
            pooled_BI: what the router reads of each prompt.
        """
        z_BD = (pooled_BI.float() - self.center_I) @ self.whiten_ID
        nearest_B = (z_BD[:, None, :] - self.means_ED).square().mean(dim=2).amin(dim=1)
        return nearest_B - (self.background_D * z_BD.square()).mean(dim=1)


def fitted(states_NI: Tensor, labels_N: Tensor, num_experts: int, dims: int = DIMS) -> Abstention:
    """Returns the part fitted to training prompts; every domain counts alike, however many prompts it has.

    Args:
        states_NI: what the router reads of each prompt.
        labels_N: its domain, int64 (N,), each of 0 .. E - 1 at least once.
        num_experts: E.
        dims: D at most; no more than the prompts span.
    """
    x_NI, labels_N = states_NI.double().cpu(), labels_N.cpu()
    counts_E = torch.bincount(labels_N, minlength=num_experts).double()
    weights_N = 1.0 / (counts_E[labels_N] * num_experts)
    center_I = weights_N @ x_NI
    # Directions from the states themselves: their covariance would square the small ones away.
    _, sizes, directions = torch.linalg.svd((x_NI - center_I) * weights_N.sqrt()[:, None], full_matrices=False)
    spanned = max(1, int((sizes > max(float(sizes[0]) * 1e-6, 1e-9)).sum()))
    basis_ID = directions[: min(dims, spanned)].T
    z_ND = (x_NI - center_I) @ basis_ID
    member_NE = torch.nn.functional.one_hot(labels_N, num_experts).double()
    means_ED = (member_NE / counts_E).T @ z_ND
    within_DD, total_DD = (_shrunk(y_ND, weights_N) for y_ND in (z_ND - means_ED[labels_N], z_ND))
    # With L L^T = within^-1, |(a - b) L|^2 is the Mahalanobis distance of a and b. Turning by the eigenvectors of
    # L^T total L leaves it so, and makes the distance from the center a weighted sum of squares.
    root_DD = torch.linalg.cholesky(torch.linalg.inv(within_DD))
    spread_D, turn_DD = torch.linalg.eigh(root_DD.T @ total_DD @ root_DD)
    map_DD = root_DD @ turn_DD
    part = Abstention(x_NI.shape[1], len(spread_D), num_experts)
    part.center_I.copy_(center_I)
    part.whiten_ID.copy_(basis_ID @ map_DD)
    part.means_ED.copy_(means_ED @ map_DD)
    part.background_D.copy_(1 / spread_D)
    return part


def _shrunk(z_ND: Tensor, weights_N: Tensor) -> Tensor:
    """Returns the covariance of centered states, drawn towards a multiple of the identity, (D, D)."""
    covariance_DD = z_ND.T @ (z_ND * weights_N[:, None])
    level = covariance_DD.diagonal().mean().clamp(min=1e-12)  # equal prompts do not spread at all
    return (1 - SHRINK) * covariance_DD + SHRINK * level * torch.eye(len(covariance_DD), dtype=z_ND.dtype)


def threshold_for(scores_N: Tensor, keep: float) -> float:
    """Returns the threshold that keeps a share of prompts.

    The k-th smallest score with k = ceil(keep (N + 1)): of new prompts of the same kind that keeps the asked share in
    the mean, not only of these (the quantile of split conformal prediction). Half way to the next score, so that one
    computed in another batch, which differs in its last bits, falls on the same side.

    Args:
        scores_N: of held-out prompts.
        keep: the share, above 0 and up to 1.
    """
    ordered = scores_N.double().sort().values
    # The subtraction keeps 0.95 * 20 = 19.000000000000004 from counting as more than 19.
    k = min(math.ceil(keep * (len(ordered) + 1) - 1e-9), len(ordered))
    highest = float(ordered[k - 1])
    return (highest + float(ordered[k])) / 2 if k < len(ordered) else highest + 1e-3 * abs(highest)
