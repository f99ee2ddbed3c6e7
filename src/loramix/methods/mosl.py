"""MoSL: MoSLD without its dropout, the paper's own ablation (Zhao et al., COLING 2025, Table 4).

y = W0 x + s * sum_k g_k B_{e_k} A x
"""

from dataclasses import replace

from loramix.experts.config import BankConfig
from loramix.methods.mosld import MOSLD

MOSL = replace(
    MOSLD,
    name="mosl",
    title="MoSL",
    summary="MoSLD without dropout",
    equation="y = W0 x + s sum_k g_k B_k A x,  g = top-2 softmax(W x)",
    bank=BankConfig(share="down"),
)
