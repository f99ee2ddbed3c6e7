"""Full fine-tuning: every weight of the base is trained.

    theta' = argmin L_LM(theta)

The upper end of every table in parameters and memory. No adapter, no router: the result is a whole model.
"""

from loramix.methods.base import Method, Stage

FULL = Method(
    name="full",
    title="full fine-tuning",
    paper="https://arxiv.org/abs/1801.06146",
    summary="all weights of the base are trained; no adapter",
    equation="theta' = argmin L_LM(theta)",
    expert_count="none",
    tuner="none",
    stages=(Stage(name="joint", trains=("base",), data="all domains"),),
)
