"""MoLA, MoE-LoRA with Layer-wise Expert Allocation (Gao et al., NAACL Findings 2025, arXiv:2402.08562).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    p = softmax(W x),  g = top-2 of p, renormalised

Experts by layer: 2, 4, 6, 8 in the quarters of the depth is the best of the paper's; 8642, 8228, 5555 are its others.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOLA = Method(
    name="mola",
    title="MoLA",
    paper="https://arxiv.org/abs/2402.08562",
    summary="token-level experts, more of them in higher layers",
    equation="y = W0 x + s sum_k g_k B_k A_k x,  g = top-2 softmax(W x)",
    expert_count="chosen",
    router=TopKRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-3}),),
    defaults={"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "allocation": "2468"},
)
