"""MoSLD with sharing and dropout on the up-projection instead (Zhao et al., COLING 2025, the other reading).

    y = W0 x + s * dropout(B) sum_k g_k A_{e_k} x,    B = 0 at the start

The paper's text can be read either way: see docs/methods/mosld.md.
"""

from dataclasses import replace

from loramix.experts.config import BankConfig
from loramix.methods.mosld import MOSLD

MOSLD_B = replace(
    MOSLD,
    name="mosld-b",
    title="MoSLD on B",
    summary="MoSLD with sharing and dropout on the up-projection",
    equation="y = W0 x + s dropout(B) sum_k g_k A_k x,  g = top-2 softmax(W x)",
    bank=BankConfig(share="up", weight_dropout=0.1),
)
