"""Arrow (Ostapenko et al., ICML 2024, arXiv:2405.11157).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    logits = |x . v_e|,    v_e = top right singular vector of B_e A_e

Trained LoRAs, routed without any training: the prototypes follow from the experts.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.prototype import PrototypeRouterConfig

ARROW = Method(
    name="arrow",
    title="Arrow",
    paper="https://arxiv.org/abs/2405.11157",
    summary="trained experts, chosen by token from their main directions; no router is trained",
    equation="y = W0 x + s sum_k g_k B_k A_k x,  g = softmax of the largest |x . v_e|",
    expert_count="one per domain",
    router=PrototypeRouterConfig(),
    scope="module",
    stages=(
        Stage(name="experts", trains=("experts",), data="each domain alone"),
        Stage(name="prototypes", trains=(), data="none"),
    ),
)
