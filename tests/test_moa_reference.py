"""MoA on a tiny Llama against the stupid reference: logits, loss, and the gradients of every expert and router."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loramix.losses import routing_cross_entropy
from loramix.tuner.layer import LoramixLinear
from tests import reference, tiny

LABELS = [2, 0]
SCALING = 16 / 4


def _reference(reads: str):
    """Returns logits, routing losses (B,) and the parameters by name, computed by the slow loops."""
    model = tiny.moa(tiny.llama(hidden=8, layers=2), router={"reads": reads}).double()
    base = tiny.llama(hidden=8, layers=2).double()
    parameters, stand_ins, doors = {}, [], {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoramixLinear):
            A_ERI, B_EOR = (p.detach().clone().requires_grad_() for p in module.bank("default").parameters())
            stand_in = reference.LabelledExpert(module.base_layer, A_ERI, B_EOR, SCALING, LABELS)
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, stand_in)
            stand_ins.append(stand_in)
            parameters[f"{name}.A"], parameters[f"{name}.B"] = A_ERI, B_EOR
            if "default" in module.loramix_router:
                weights = [p.detach().clone().requires_grad_() for p in module.router("default").parameters()]
                doors[name] = (stand_in, weights)
                parameters[f"{name}.router0"], parameters[f"{name}.router1"] = weights
    ids, prompt = tiny.ids(2, 6), [3, 2]
    if reads == "base":
        for stand_in in stand_ins:
            stand_in.scaling = 0.0
        with torch.no_grad():
            base(ids)
        states = {name: stand_in.seen.detach() for name, (stand_in, _) in doors.items()}
        for stand_in in stand_ins:
            stand_in.scaling = SCALING
    logits = base(ids).logits
    if reads == "experts":
        states = {name: stand_in.seen for name, (stand_in, _) in doors.items()}
    losses = []
    for row, label in enumerate(LABELS):
        by_layer = []
        for name, (_, weights) in doors.items():
            scores = reference.router_logits(states[name][row, prompt[row] - 1], *weights)
            by_layer.append(reference.cross_entropy(scores, label))
        losses.append(sum(by_layer) / len(by_layer))
    return logits, torch.stack(losses), parameters


@pytest.mark.parametrize("reads", ["base", "experts"])
@pytest.mark.parametrize("backend", ["loop", "concat", "per_sequence"])
def test_against_reference(reads: str, backend: str):
    wanted_logits, wanted_losses, wanted = _reference(reads)
    (wanted_logits.sin().sum() + 0.3 * wanted_losses.sum()).backward()

    model = tiny.moa(tiny.llama(hidden=8, layers=2), router={"reads": reads}, backend=backend).double().train()
    ids = tiny.ids(2, 6)
    prompt_mask = torch.arange(6)[None] < torch.tensor([[3], [2]])
    labels = torch.tensor(LABELS)
    logits = model(input_ids=ids, domain_ids=labels, prompt_mask=prompt_mask).logits
    losses = routing_cross_entropy(model.routings, labels)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=1e-5, atol=1e-5)
    (logits.sin().sum() + 0.3 * losses.sum()).backward()

    compared = 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoramixLinear):
            parts: list[nn.Parameter] = [*module.bank("default").parameters()]
            names = [f"{name}.A", f"{name}.B"]
            if "default" in module.loramix_router:
                parts += [*module.router("default").parameters()]
                names += [f"{name}.router0", f"{name}.router1"]
            for part_name, part in zip(names, parts, strict=True):
                torch.testing.assert_close(part.grad, wanted[part_name].grad, rtol=1e-4, atol=1e-5, msg=part_name)
                compared += 1
    assert compared == 2 * (7 * 2 + 2)


def test_routing_loss_reaches_experts_only_when_routers_read_them():
    for reads, reaches in (("base", False), ("experts", True)):
        model = tiny.moa(router={"reads": reads}).train()
        labels = torch.tensor([0, 1, 2])
        model(input_ids=tiny.ids(), domain_ids=labels)
        routing_cross_entropy(model.routings, labels).sum().backward()
        touched = [
            p.grad is not None and bool(p.grad.abs().sum() > 0)
            for n, p in model.named_parameters()
            if "loramix_bank" in n
        ]
        assert any(touched) is reaches
