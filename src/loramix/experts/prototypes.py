"""An expert's main direction, by which Arrow recognises what it is good at."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def prototypes(A_ERI: Tensor, B_EOR: Tensor) -> Tensor:
    """Returns the top right singular vector of each B_e A_e, unit length, (E, I), in fp64 inside.

    Exact and cheap: with A^T = Q T (QR), B A = (B T^T) Q^T, so the vector is Q times that of the small (O, R) matrix.
    Ostapenko et al. 2024, section 4.1.
    """
    found = []
    for down_RI, up_OR in zip(A_ERI.double(), B_EOR.double(), strict=True):
        basis_IR, triangle_RR = torch.linalg.qr(down_RI.T)
        _, _, right_RR = torch.linalg.svd(up_OR @ triangle_RR.T, full_matrices=False)
        found.append(basis_IR @ right_RR[0])
    return torch.stack(found).to(A_ERI.dtype)
