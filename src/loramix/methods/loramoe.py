"""LoRAMoE (Dou et al., ACL 2024, arXiv:2312.09979).

    y = W0 x + s * sum_e p_e B_e A_e x,    p = softmax(W x), all experts, feed-forward linears only
    L = L_LM + beta * L_lbc: one half of the experts is pushed towards each kind of data

Which kind a domain is: `data.kinds`. The authors' code divides by mean^2 (loss `localized_balance_cv`) and ships with
the weight 0; the paper's form and weight are the default.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.soft import SoftRouterConfig

LORAMOE = Method(
    name="loramoe",
    title="LoRAMoE",
    paper="https://arxiv.org/abs/2312.09979",
    summary="two groups of experts on the feed-forward linears, each pushed towards one kind of data",
    equation="y = W0 x + s sum_e p_e B_e A_e x,  p = softmax(W x);  + beta var(Z) / mean(Z)",
    expert_count="chosen",
    router=SoftRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"localized_balance": 0.1}),),
    defaults={
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 6,
        "target_modules": "ffn-linear",
    },
)
