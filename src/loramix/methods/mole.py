"""MoLE, Mixture of LoRA Experts (Wu, Huang and Wei, ICLR 2024, arXiv:2404.13628).

    y = W0 x + s * sum_e g_e B_e A_e x,    g = softmax(W normalise(outputs side by side) / tau)
    L = L_LM - alpha * log prod_e q_e,    q_e the mean weight of expert e over all gates

Trained LoRAs, frozen; only the gates and their temperature train.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.gate import GateRouterConfig

MOLE = Method(
    name="mole",
    title="MoLE",
    paper="https://arxiv.org/abs/2404.13628",
    summary="trained experts, frozen; a gate per layer weighs them by their outputs",
    equation="y = W0 x + s sum_e g_e B_e A_e x,  g = softmax(W [B_1 A_1 x; ...] / tau)",
    expert_count="one per domain",
    router=GateRouterConfig(),
    scope="layer",
    stages=(
        Stage(name="experts", trains=("experts",), data="each domain alone"),
        Stage(name="gates", trains=("routers",), data="all domains", losses={"gate_balance": 0.5}),
    ),
)
