"""Prefix-tuning (Li and Liang, ACL 2021, arXiv:2101.00190), as PEFT has it.

    attention over [P_k; K] and [P_v; V],    P trained, one pair for each layer

A baseline of MoSLD's tables. loramix adds nothing: `peft.PrefixTuningConfig` makes and saves it.
"""

from loramix.methods.base import Method, Stage

PREFIX = Method(
    name="prefix",
    title="prefix-tuning",
    paper="https://arxiv.org/abs/2101.00190",
    summary="trained keys and values before each layer's own; PEFT's implementation",
    equation="attention over [P_k; K] and [P_v; V]",
    expert_count="none",
    tuner="prefix",
    stages=(Stage(name="joint", trains=("experts",), data="all domains"),),
    defaults={"num_virtual_tokens": 30},
)
