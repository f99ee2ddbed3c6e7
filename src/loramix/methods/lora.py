"""LoRA: one low-rank update for all tokens (Hu et al., ICLR 2022, arXiv:2106.09685).

    y = W0 x + alpha / r * B A x,    B = 0 at the start

The baseline of every table: on one domain ("single LoRA") or on all of them ("mixed LoRA").
"""

from loramix.methods.base import Method, Stage

LORA = Method(
    name="lora",
    title="LoRA",
    paper="https://arxiv.org/abs/2106.09685",
    summary="one expert for all tokens, no router",
    equation="y = W0 x + s B A x",
    expert_count="one",
    stages=(Stage(name="joint", trains=("experts",), data="all domains"),),
)
