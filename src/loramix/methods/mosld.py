"""MoSLD, Mixture-of-Shared-LoRAs with Dropout (Zhao et al., COLING 2025, arXiv:2412.08946).

    y = W0 x + s * sum_k g_k B_{e_k} (dropout(A) x),    p = softmax(W x),  g = top-2 of p, renormalised
    L = L_LM + 1e-3 * mean over routers of E * sum_e f_e P_e

One A for all experts of a module; the dropout is on its weights, one mask a forward. Experts by layer: 2, 4, 6, 8 in
the quarters of the depth (the paper's Figure 7; its text says 8642). Contradictions of the paper and how they were
resolved: docs/methods/mosld.md.
"""

from loramix.experts.config import BankConfig
from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOSLD = Method(
    name="mosld",
    title="MoSLD",
    paper="https://arxiv.org/abs/2412.08946",
    summary="token-level experts that share the down-projection, with dropout on it",
    equation="y = W0 x + s sum_k g_k B_k dropout(A) x,  g = top-2 softmax(W x)",
    expert_count="chosen",
    bank=BankConfig(share="down", weight_dropout=0.1),
    router=TopKRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-3}),),
    defaults={"r": 8, "lora_alpha": 16, "allocation": "2468", "target_modules": "qv-linear"},
)
