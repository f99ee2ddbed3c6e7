"""MoSLD with sharing and dropout on the up-projection instead (Zhao et al., COLING 2025, the other reading).

    y = W0 x + s * dropout(B) sum_k g_k A_{e_k} x,    B = 0 at the start

The paper's text can be read either way: see docs/methods/mosld.md.
"""

from loramix.experts.config import BankConfig
from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MOSLD_B = Method(
    name="mosld-b",
    title="MoSLD on B",
    paper="https://arxiv.org/abs/2412.08946",
    summary="MoSLD with sharing and dropout on the up-projection",
    equation="y = W0 x + s dropout(B) sum_k g_k A_k x,  g = top-2 softmax(W x)",
    expert_count="chosen",
    bank=BankConfig(share="up", weight_dropout=0.1),
    router=TopKRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-3}),),
    defaults={"r": 8, "lora_alpha": 16, "allocation": "2468", "target_modules": "qv-linear"},
)
