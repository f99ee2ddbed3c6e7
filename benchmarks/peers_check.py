"""Do the peers' forms compute what loramix computes? One layer of random weights, the same experts and routers in both.

python benchmarks/step_cost.py --check
"""

from __future__ import annotations

from itertools import chain

import torch
from peers import FORMS, Mixture, PlainLora
from step_variants import NEEDS_FFN, Spec, built, our_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@torch.no_grad()
def take_weights(peer: nn.Module, ours: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter, int | None]]:
    """Gives a peer's model the experts and routers of loramix's.

    Returns:
        By name, each trained tensor of the peer's, loramix's tensor that holds it, and at which expert (None: all).
    """
    layers = {name: module for name, module in ours.named_modules() if hasattr(module, "loramix_bank")}
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter, int | None]] = {}
    for name, module in peer.named_modules():
        if not isinstance(module, Mixture | PlainLora):
            continue
        for end, experts in module.matching().items():
            bank = layers[name + end].loramix_bank["default"]
            for kind, stack in (("lora_A", bank.A_ERI), ("lora_B", bank.B_EOR)):
                for expert, one in enumerate(getattr(experts, kind)):
                    pairs[f"{name}{end}.{kind}.{expert}"] = (one.weight, stack, expert)
            door = layers[name + end].loramix_router
            if "default" in door:
                matrix = next(chain(door["default"].parameters(), door["default"].buffers()))
                pairs[f"{name}.router"] = (module.router.weight, matrix, None)
    for theirs, own, expert in pairs.values():
        theirs.copy_(own if expert is None else own[expert])
    return pairs


def check(experts: int = 4, rank: int = 8) -> list[str]:
    """Compares each peer's form with loramix on one layer of random weights: logits, loss and every gradient.

    Returns:
        A line for each form.

    Raises:
        AssertionError: they are further apart than 1e-5.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config).requires_grad_(False)
    found = []
    for method, form in FORMS:
        targets = "all-linear" if method in NEEDS_FFN else "q,v"
        apart = {}
        for backend in ("auto", "loop"):
            theirs = built(Spec(method, form, targets, experts, rank), base, rows=4, length=64)
            ours = built(Spec(method, "loramix", targets, experts, rank, backend=backend), base, rows=4, length=64)
            ours.model = our_model(base, ours.spec, init_lora_weights=False)
            pairs = take_weights(theirs.model, ours.model.base_model.model)
            logits = [one.logits() for one in (theirs, ours)]
            losses = [one.loss() for one in (theirs, ours)]
            for loss in losses:
                loss.backward()
            assert all((one.grad is not None) == one.requires_grad for one, _, _ in pairs.values()), f"{method}, {form}"
            gradients = [
                (one.grad, own.grad if expert is None else own.grad[expert])
                for one, own, expert in pairs.values()
                if one.requires_grad
            ]
            differences = [(a - b).abs().max().item() for a, b in (logits, losses, *gradients)]
            apart[backend] = max(differences)
            assert len(gradients) == sum(p.requires_grad for p in theirs.model.parameters()), f"{method}, {form}"
            assert all(own.abs().max() > 0 for _, own in gradients), f"{method}, {form}: a gradient is zero"
            assert apart[backend] < 1e-5, f"{method}, {form}: {apart[backend]:.1e} from loramix ({backend})"
        found.append(f"{method:10} {form:15} {apart['auto']:.0e} from auto, {apart['loop']:.0e} from loop")
    return found
