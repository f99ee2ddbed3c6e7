"""MoE-LoRA (naive), the second token-routed baseline of MoA's paper (Feng et al. 2024, Table 7).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    all experts start at random and train together

As MoE-LoRA without the first stage.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOE_LORA_NAIVE = Method(
    name="moe-lora-naive",
    title="MoE-LoRA (naive)",
    paper="https://arxiv.org/abs/2403.03432",
    summary="MoE-LoRA with experts that start at random",
    equation="y = W0 x + s sum_k g_k B_k A_k x,  g = top-k softmax(W x)",
    expert_count="one per domain",
    router=TopKRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 0.0}),),
)
