"""MoE-LoRA, the token-routed baseline of MoA's paper (Feng et al. 2024, Table 7).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    p = softmax(W x),  g = top-k of p, renormalised

MoA's experts, trained each on its domain first, but chosen by token and without any domain label. The paper states
neither k nor a balance loss: k = 2 and the weight 0 are chosen here, so that it differs from MoA in the routing alone.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOE_LORA = Method(
    name="moe-lora",
    title="MoE-LoRA",
    paper="https://arxiv.org/abs/2403.03432",
    summary="MoA's trained experts, chosen by token without labels",
    equation="y = W0 x + s sum_k g_k B_k A_k x,  g = top-k softmax(W x)",
    expert_count="one per domain",
    router=TopKRouterConfig(),
    scope="module",
    stages=(
        Stage(name="experts", trains=("experts",), data="each domain alone"),
        Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 0.0}),
    ),
)
