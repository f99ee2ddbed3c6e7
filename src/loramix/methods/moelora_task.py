"""MOELoRA with a task gate (Liu et al., SIGIR 2024, arXiv:2310.18339).

    y = W0 x + alpha / r * sum_e omega_e B_e A_e x,    omega = softmax(W_g e_task),    experts of rank r / E

The gate reads the task's id and nothing of the input, so the caller names the domain at inference too
(`generate(..., domain_ids=...)`). For one task the weights are constants.
"""

from loramix.experts.config import BankConfig
from loramix.methods.base import Method, Stage
from loramix.routers.task import TaskRouterConfig

MOELORA_TASK = Method(
    name="moelora-task",
    title="MOELoRA (task gate)",
    paper="https://arxiv.org/abs/2310.18339",
    summary="experts weighted by the task's id alone; all together have one LoRA's rank",
    equation="y = W0 x + s sum_e w_e B_e A_e x,  w = softmax(W e_task),  rank r / E each",
    expert_count="chosen",
    bank=BankConfig(split_rank=True),
    router=TaskRouterConfig(),
    scope="module",
    stages=(Stage(name="joint", trains=("experts", "routers"), data="all domains"),),
    defaults={"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "num_experts": 8},
)
