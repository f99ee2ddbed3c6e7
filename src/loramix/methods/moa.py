"""MoA, Mixture-of-LoRAs (Feng et al., LREC-COLING 2024, arXiv:2403.03432).

    stage 1:  each expert alone on its domain,         L = L_LM
    stage 2:  experts and routers on all domains,      L = L_LM + eta * mean_l CE(router_l(prompt), domain)

One expert per sequence: the label's in training, the routers' choice at inference. One router per layer, shared by its
attention and feed-forward linears. What the paper leaves open (eta, pooling, activation, decision) is an option; see
docs/methods/moa.md for what was chosen and why.
"""

from loramix.methods.base import Method, Stage
from loramix.routers.sequence import SequenceRouterConfig

MOA = Method(
    name="moa",
    title="MoA (Mixture-of-LoRAs)",
    paper="https://arxiv.org/abs/2403.03432",
    summary="one expert per domain; a router per layer is taught the domain label; one expert per sequence",
    equation="y = W0 x + s B_e A_e x,  e = argmax router(prompt)",
    expert_count="one per domain",
    router=SequenceRouterConfig(),
    scope="layer",
    decision="last",
    stages=(
        Stage(name="experts", trains=("experts",), data="each domain alone"),
        Stage(
            name="joint",
            trains=("experts", "routers"),
            data="all domains",
            losses={"routing_cross_entropy": 0.1},
        ),
    ),
)
