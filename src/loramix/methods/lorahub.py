"""LoRAHub (Huang et al., COLM 2024, arXiv:2307.13269).

    y = W0 x + s * (sum_e w_e B_e)(sum_e w_e A_e) x
    w = argmin mean loss of a few examples + 0.05 mean |w_e|,    -1.5 <= w_e <= 1.5, gradient-free

Trained LoRAs; A and B are summed separately, so cross terms appear. The weights are the same for every input.
"""

from loramix.experts.config import BankConfig
from loramix.methods.base import FewShotSearch, Method, Stage
from loramix.routers.constant import ConstantRouterConfig

LORAHUB = Method(
    name="lorahub",
    title="LoRAHub",
    paper="https://arxiv.org/abs/2307.13269",
    summary="trained experts summed with weights found from a few examples, without gradients",
    equation="y = W0 x + s (sum_e w_e B_e)(sum_e w_e A_e) x",
    expert_count="one per domain",
    bank=BankConfig(combine="matrices"),
    router=ConstantRouterConfig(),
    scope="model",
    stages=(
        Stage(name="experts", trains=("experts",), data="each domain alone"),
        Stage(name="weights", trains=("routers",), data="a few examples", search=FewShotSearch()),
    ),
)
