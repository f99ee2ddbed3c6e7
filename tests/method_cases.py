"""Each method as its paper has it (research notes, section 3), and its slow twin that reads the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from loramix import LoramixConfig
from loramix.tuner.assembly import put_experts, take_expert
from tests import reference_methods as slow
from tests import tiny

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
QV = ("q_proj", "v_proj")
DOMAINS = ["red", "green", "blue"]
ALPHA, RANK = 6, 4

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """A batch of two rows, the second with two places of padding at its end."""

    ids: Tensor
    mask: Tensor
    domains: tuple[int, ...] = (2, 0)
    kinds: tuple[int, ...] = (1, 0)


@dataclass(frozen=True)
class Case:
    """What the paper says of a method.

    Attributes:
        settings: for LoramixConfig.
        routed: linears with experts, by their last name; `plain` ones have one LoRA.
        scope: who shares a router.
        router: makes the slow router from its weights and the batch; None for a method without.
        trains: what gets gradients.
        linear: how the experts of a linear are added up.
        ranks: a tuple of (rank of an expert, scaling).
    """

    settings: dict[str, Any]
    routed: tuple[str, ...]
    router: Callable[[Weights, Batch], slow.Router] | None = None
    scope: str = "module"
    plain: tuple[str, ...] = ()
    trains: tuple[str, ...] = ("bank", "router")
    linear: type[slow.MixedLinear] = slow.MixedLinear
    whole_ffn: bool = False
    ranks: tuple[int, float] = (RANK, ALPHA / RANK)
    losses: tuple[str, ...] = ("load_balance", "router_z", "localized_balance", "localized_balance_cv")


def _top2(weights: Weights, _: Batch) -> slow.Router:
    return slow.top_k(weights["w_EI"], 2)


def _soft(weights: Weights, _: Batch) -> slow.Router:
    return slow.soft(weights["w_EI"])


NAMED = {"experts": DOMAINS}
FOUR = {"num_experts": 4}
GROWING = {"allocation": "24"}
CASES: dict[str, Case] = {
    "lora": Case({}, ATTENTION + FFN, trains=("bank",), losses=()),
    "moe-lora": Case(NAMED, ATTENTION + FFN, _top2),
    "moe-lora-naive": Case(NAMED, ATTENTION + FFN, _top2),
    "mosld": Case({**GROWING, "bank": {"weight_dropout": 0.0}}, QV, _top2),
    "mosl": Case(GROWING, QV, _top2),
    "mosld-b": Case({**GROWING, "bank": {"weight_dropout": 0.0}}, QV, _top2),
    "molora": Case(FOUR, ATTENTION + FFN, _soft),
    "sira": Case(
        {**FOUR, "router": {"gate_dropout": 0.0, "capacity_factor": 0.75}},
        ATTENTION + FFN,
        lambda weights, batch: slow.capacity(weights["w_EI"], 2, batch.mask, factor=0.75),
    ),
    "mola": Case(GROWING, ATTENTION + FFN, _top2),
    "mixlora": Case({"num_experts": 3}, FFN, _top2, scope="block", plain=ATTENTION, whole_ffn=True),
    "hydralora": Case(FOUR, FFN, _soft),
    "loramoe": Case(FOUR, FFN, _soft),
    "moelora-task": Case(
        {**FOUR, "domains": DOMAINS, "r": 8},
        ATTENTION + FFN,
        lambda weights, batch: slow.task(weights["embedding_DH"], weights["w_EH"], batch.domains),
        ranks=(2, ALPHA / 8),
        losses=(),
    ),
    "moelora-contrastive": Case(FOUR, ATTENTION + FFN, _top2, losses=("load_balance", "router_z", "contrastive")),
    "llava-mole": Case(
        {"num_experts": 3},
        FFN,
        lambda weights, _: slow.top_k(weights["w_EI"], 1, "one"),
        scope="block",
        plain=ATTENTION,
    ),
    "mole": Case(
        NAMED,
        ATTENTION + FFN,
        lambda weights, _: slow.over_outputs(weights["w_EX"], weights["log_temperature"]),
        scope="layer",
        trains=("router",),
        losses=("gate_balance", "router_z", "load_balance"),
    ),
    "arrow": Case(
        NAMED, ATTENTION + FFN, lambda weights, _: slow.prototype(weights["main"], 2), trains=(), losses=("router_z",)
    ),
    "lorahub": Case(
        NAMED,
        ATTENTION + FFN,
        lambda weights, _: slow.constant(weights["weights_E"]),
        scope="model",
        trains=("router",),
        linear=slow.SummedLinear,
        losses=(),
    ),
}
TOKEN_ROUTED = [name for name in CASES if name not in ("lora", "moelora-task", "lorahub")]
SPARSE = [name for name in TOKEN_ROUTED if name not in ("molora", "hydralora", "loramoe", "mole")]
IDLE = [name for name in SPARSE if name != "arrow"]
"""Methods that train experts of which some may get no token."""


def batch(rows: int = 2, length: int = 6) -> Batch:
    ids = tiny.ids(rows, length)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    return Batch(ids, mask)


class Norm(torch.nn.Module):
    """RMSNorm in its input's type; transformers' own goes through fp32, which would blur what is compared in fp64."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = torch.nn.Parameter(weight, requires_grad=False), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt()


@contextmanager
def all_in_double() -> Iterator[None]:
    """Routers and losses compute in fp32; in here they keep fp64, so that a wrong digit is no rounding."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "float", lambda self: self)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def base(hidden: int = 8) -> torch.nn.Module:
    made = tiny.llama(hidden=hidden, layers=2)
    for name, module in list(made.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            made.set_submodule(name, Norm(module.weight.detach(), module.variance_epsilon))
    return made


def build(
    name: str, on: torch.nn.Module | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> PeftModel:
    """The method on a tiny base, with experts and routers that are all different from zero and from each other."""
    given = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, **CASES[name].settings, **settings}
    torch.manual_seed(3)
    model = get_peft_model(on or base(), LoramixConfig(method=name, init_lora_weights=False, **given))
    for parameter_name, parameter in model.named_parameters():
        if "loramix_router" in parameter_name:
            parameter.data = torch.randn(parameter.shape) * 0.6
    model.to(dtype)
    if name == "arrow":
        find_prototypes(model)
    return model


def find_prototypes(model: PeftModel) -> None:
    """Puts an arrow mixture's experts in anew, through the door that experts trained elsewhere come in by."""
    inside = model.get_base_model()
    put_experts(inside, "default", {name: take_expert(inside, "default", e) for e, name in enumerate(DOMAINS)})


@dataclass
class Twin:
    """The slow twin of a model.

    Attributes:
        model: the base with slow modules in place of its adapted ones.
        parameters: copies of the model's adapter parameters, by their full name in the model.
        book: what the routers of the last forward decided.
    """

    model: torch.nn.Module
    parameters: dict[str, Tensor]
    book: slow.Book = field(default_factory=slow.Book)


def scope_of(name: str, scope: str) -> str:
    """Where a linear "model.layers.1.mlp.up_proj" belongs."""
    layer, part = name.split(".")[2:4]
    return {"module": name, "block": f"{layer}.{part}", "layer": layer, "model": "model"}[scope]


def twin(name: str, model: PeftModel, given: Batch, masks: dict[str, Tensor] | None = None) -> Twin:
    """Returns the slow twin.

    Args:
        name: of the method.
        model: whose parameters are copied.
        given: the batch it will be run on; some routers know its padding or its domains.
        masks: by parameter name, what a matrix is multiplied with before it is used (its dropout, scaled).
    """
    case, masks = CASES[name], masks or {}
    made = Twin(base().double(), {})
    for parameter_name, parameter in model.named_parameters():
        if "loramix_" in parameter_name:
            made.parameters[parameter_name] = parameter.detach().double().clone().requires_grad_()
    with_router: set[str] = set()
    modules = [n for n, m in made.model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    for module in modules:
        leaf = module.rpartition(".")[2]
        if leaf not in case.routed + case.plain:
            continue
        bank = f"base_model.model.{module}.loramix_bank.default"
        A, B = (made.parameters[f"{bank}.{part}"] * masks.get(f"{bank}.{part}", 1.0) for part in ("A_ERI", "B_EOR"))
        linear = made.model.get_submodule(module)
        if leaf in case.plain or case.router is None:
            new: torch.nn.Module = slow.PlainLinear(linear, A[0], B[0], ALPHA / RANK)
        else:
            assert A.shape[1] == case.ranks[0]
            scope = scope_of(module, case.scope)
            new = case.linear(linear, A, B, case.ranks[1], (made.book, scope, module))
            if scope not in with_router:
                with_router.add(scope)
                new.router = case.router(_router_weights(made.parameters, module, A, B), given)
        made.model.set_submodule(module, new)
    if case.whole_ffn:
        for layer in made.model.model.layers:
            layer.mlp = slow.MixedFFN({leaf: getattr(layer.mlp, leaf) for leaf in FFN})
    return made


def _router_weights(parameters: Weights, module: str, A: Tensor, B: Tensor) -> Weights:
    """The router that sits at a module, by the short names of its weights; and the main directions of the experts."""
    start = f"base_model.model.{module}.loramix_router.default."
    found = {name.removeprefix(start): p for name, p in parameters.items() if name.startswith(start)}
    return found or {"main": slow.main_directions(A.detach(), B.detach())}
