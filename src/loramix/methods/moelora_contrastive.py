"""MoELoRA with a contrastive loss (Luo et al. 2024, arXiv:2402.12851).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    g = top-2 of softmax(W x), renormalised
    L = L_LM + balance + InfoNCE over expert outputs: of one expert alike, of different experts unlike

Against experts that become interchangeable. No code was published.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOELORA_CONTRASTIVE = Method(
    name="moelora-contrastive",
    title="MoELoRA (contrastive)",
    paper="https://arxiv.org/abs/2402.12851",
    summary="token-level experts whose outputs are pushed apart by a contrastive loss",
    equation="y = W0 x + s sum_k g_k B_k A_k x,  g = top-2 softmax(W x);  + InfoNCE over B_k A_k x",
    expert_count="chosen",
    router=TopKRouterConfig(),
    scope="module",
    stages=(
        Stage(
            name="joint",
            trains=("experts", "routers"),
            data="all domains",
            losses={"load_balance": 1e-2, "contrastive": 1e-2},
        ),
    ),
    defaults={"r": 4, "num_experts": 8},
)
