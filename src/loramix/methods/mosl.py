"""MoSL: MoSLD without its dropout, the paper's own ablation (Zhao et al., COLING 2025, Table 4).

y = W0 x + s * sum_k g_k B_{e_k} A x
"""

from loramix.experts.config import BankConfig
from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOSL = Method(
    name="mosl",
    title="MoSL",
    paper="https://arxiv.org/abs/2412.08946",
    summary="MoSLD without dropout",
    equation="y = W0 x + s sum_k g_k B_k A x,  g = top-2 softmax(W x)",
    expert_count="chosen",
    bank=BankConfig(share="down"),
    router=TopKRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-3}),),
    defaults={"r": 8, "lora_alpha": 16, "allocation": "2468", "target_modules": "qv-linear"},
)
