"""SiRA, Sparse Mixture of Low Rank Adaptation (Zhu et al., Google 2023, arXiv:2311.09179).

    y = W0 x + s * sum_k g_k B_{e_k} A_{e_k} x,    g = TopK(Dropout(softmax(W x)), K)
    an expert takes at most C tokens of a sequence; what it drops gets only the frozen path from it

With a balance loss on the dropped-out gates. No code was published; values the paper leaves out were chosen.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.capacity import CapacityRouterConfig

SIRA = Method(
    name="sira",
    title="SiRA",
    paper="https://arxiv.org/abs/2311.09179",
    summary="top-k with a capacity for each expert and dropout on the gate",
    equation="y = W0 x + s sum_k g_k B_k A_k x,  g = TopK(Dropout(softmax(W x))), at most C tokens an expert",
    expert_count="chosen",
    router=CapacityRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains", losses={"load_balance": 1e-2}),),
    defaults={"r": 4, "num_experts": 8},
)
