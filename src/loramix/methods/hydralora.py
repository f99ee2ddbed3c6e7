"""HydraLoRA (Tian et al., NeurIPS 2024, arXiv:2404.19245).

    y = W0 x + s * sum_e p_e B_e (A x),    p = softmax(W x), all experts

One A for all experts, no balance loss. The paper finds the number of heads by clustering the data (k-means, elbow);
here it is a setting. Closest relative of MoSLD.
"""

from loramix.experts.config import BankConfig
from loramix.methods.base import Method, Stage
from loramix.routers.soft import SoftRouterConfig

HYDRALORA = Method(
    name="hydralora",
    title="HydraLoRA",
    paper="https://arxiv.org/abs/2404.19245",
    summary="one shared down-projection, several up-projections, all weighted by a softmax",
    equation="y = W0 x + s sum_e p_e B_e A x,  p = softmax(W x)",
    expert_count="chosen",
    bank=BankConfig(share="down"),
    router=SoftRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains"),),
    defaults={
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 4,
        "target_modules": "ffn-linear",
    },
)
