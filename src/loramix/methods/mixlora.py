"""MixLoRA (Li et al. 2024, arXiv:2404.15159).

    FFN(x) = sum_k g_k E_{e_k}(x),    E_e(x) = W_d' (act(W_g' x) * (W_u' x)),    W' = W + s B_e A_e
    attention: plain LoRA

An expert is a whole feed-forward block: the frozen one with a LoRA of its own on each matrix. One router per block.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.topk import TopKRouterConfig

MIXLORA = Method(
    name="mixlora",
    title="MixLoRA",
    paper="https://arxiv.org/abs/2404.15159",
    summary="experts are whole feed-forward blocks over shared frozen weights; plain LoRA on attention",
    equation="FFN(x) = sum_k g_k E_k(x),  E_e = frozen FFN with LoRA e on each matrix",
    expert_count="chosen",
    router=TopKRouterConfig(init_std=0.02),
    scope="block",
    routed="ffn",
    whole_ffn=True,
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-2}),),
    defaults={"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "num_experts": 8},
)
