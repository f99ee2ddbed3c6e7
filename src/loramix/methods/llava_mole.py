"""LLaVA-MoLE's sparse mixture (Chen et al. 2024, arXiv:2401.16160), on text.

    y = W0 x + s * B_e A_e x,    e = argmax softmax(W x), one router per feed-forward block
    attention: plain LoRA

The chosen expert is not multiplied by its gate: the router learns from the balance loss alone, as in the authors' code.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

LLAVA_MOLE = Method(
    name="llava-mole",
    title="LLaVA-MoLE",
    paper="https://arxiv.org/abs/2401.16160",
    summary="one expert per token, chosen once for a feed-forward block; plain LoRA on attention",
    equation="y = W0 x + s B_e A_e x,  e = argmax softmax(W x)",
    expert_count="chosen",
    router=TopKRouterConfig(top_k=1, weighting="one"),
    scope="block",
    routed="ffn",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-2}),),
    defaults={"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "num_experts": 3},
)
