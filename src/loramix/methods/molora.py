"""MoLoRA (Zadouri et al., Pushing Mixture of Experts to the Limit, ICLR 2024, arXiv:2309.05444).

    y = W0 x + s * sum_e p_e B_e A_e x,    p = softmax(W x), all experts

The paper finds soft routing better than discrete, and about ten experts enough.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.soft import SoftRouterConfig

MOLORA = Method(
    name="molora",
    title="MoLoRA",
    paper="https://arxiv.org/abs/2309.05444",
    summary="all experts take part in every token, weighted by a softmax",
    equation="y = W0 x + s sum_e p_e B_e A_e x,  p = softmax(W x)",
    expert_count="chosen",
    router=SoftRouterConfig(init_std=0.02),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains"),),
    defaults={"r": 4, "lora_alpha": 16, "num_experts": 10},
)
