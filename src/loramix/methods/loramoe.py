"""LoRAMoE (Dou et al., ACL 2024, arXiv:2312.09979).

    y = W0 x + s * sum_e p_e B_e A_e x,    p = softmax(W x), all experts, feed-forward linears only
    L = L_LM + beta * L_lbc: each half of the experts is loaded by one kind of data more

Which kind a domain is: `data.kinds`. The authors' code has another form of the loss and ships with its weight at 0. It
is the default here, as the paper's own form pushes the wrong way round (losses/localized_balance.py), with the paper's
weight.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.soft import SoftRouterConfig

LORAMOE = Method(
    name="loramoe",
    title="LoRAMoE",
    paper="https://arxiv.org/abs/2312.09979",
    summary="two groups of experts on the feed-forward linears, each loaded by one kind of data more",
    equation="y = W0 x + s sum_e p_e B_e A_e x,  p = softmax(W x);  + beta var(Z) / mean(Z)^2",
    expert_count="chosen",
    router=SoftRouterConfig(),
    scope="module",
    stages=(
        Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"localized_balance_cv": 0.1}),
    ),
    defaults={
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 6,
        "target_modules": "ffn-linear",
    },
)
