"""Lean norms and activations: the loss and all gradients of the base's own code, in every method; put back after."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from loramix.data.padding_free import PaddingFreeCollator
from loramix.methods import METHODS
from loramix.models.lean_activations import lean_activations, silu_times
from loramix.models.lean_norms import lean_norms, rms_norm
from loramix.training.arguments import training_arguments
from loramix.training.settings import TrainingSettings
from loramix.training.trainer import MixtureTrainer
from loramix.training.while_learning import while_learning
from tests import method_cases as cases
from tests import tiny
from tests.test_padding_free import SMALL, built, examples

OFF = {"lean_norms": False, "lean_activations": False}


def learned(
    model: Any, losses: dict[str, float], checkpointed: bool = False, **given: Any
) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, the gradients and the bytes kept for them of one step as training takes it."""
    chosen = TrainingSettings(max_steps=1, **given)
    trainer = MixtureTrainer(
        model.train(),
        settings=chosen,
        domains=tiny.EXPERTS,
        auxiliary=losses,
        kinds=[1, 0, 1],
        args=training_arguments(chosen, "unused"),
        train_dataset=[0],
    )
    if checkpointed:
        model.get_base_model().activation_checkpointing_enable()
    batches, _ = trainer.get_batch_samples(iter([PaddingFreeCollator()(examples())]), 1, torch.device("cpu"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with while_learning(model, chosen, apart=True), saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(model, batches[0])
        loss.backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return loss.detach(), found, sum(one.nbytes() for place, one in kept.items() if place not in weights)


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, right in wanted.items():
        torch.testing.assert_close(got[name], right, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", [*cases.CASES, "moa", "moa experts", "moa mean"])
def test_loss_and_gradients_are_those_of_the_bases_own_code(method: str):
    if not METHODS[method.split(maxsplit=1)[0]].trains:
        pytest.skip("nothing is trained")
    case = cases.CASES.get(method)
    names = case.losses if case else ("routing_cross_entropy",)
    losses = {name: 0.1 + 0.1 * number for number, name in enumerate(names)}
    loss, gradients, kept = learned(built(method), losses, **OFF)
    lean_loss, lean, lean_kept = learned(built(method), losses)
    torch.testing.assert_close(lean_loss, loss)
    assert any(float(one.abs().max()) > 1e-4 for one in lean.values())
    same(lean, gradients)
    assert lean_kept < kept


@pytest.mark.parametrize("method", ["lora", "moa", "mixlora"])
def test_checkpointing_on_is_off(method: str):
    loss, gradients, _ = learned(built(method), {})
    again_loss, again, _ = learned(built(method), {}, checkpointed=True)
    assert torch.equal(again_loss, loss)
    for name, wanted in gradients.items():
        assert torch.equal(again[name], wanted), name


def test_under_autocast_it_is_as_near_to_fp32_as_the_bases_own_code():
    true, gradients, _ = learned(built("lora"), {}, **OFF)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own_loss, own, _ = learned(built("lora"), {}, **OFF)
        loss, lean, _ = learned(built("lora"), {})
    assert abs(loss - true) <= 1.5 * abs(own_loss - true) + 1e-2
    far = lambda found: sum(float((found[n] - g).square().sum()) for n, g in gradients.items()) ** 0.5  # noqa: E731
    assert far(lean) <= 1.5 * far(own)


def test_the_functions_gradients_are_the_slopes():
    draw = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(3, 2, 5, dtype=torch.float64, generator=draw, requires_grad=True) for _ in range(3))
    weight = torch.randn(5, dtype=torch.float64, generator=draw)
    assert torch.autograd.gradcheck(lambda one: rms_norm(one, weight, 1e-5), (x,))
    assert torch.autograd.gradcheck(silu_times, (gate, up))
    assert torch.autograd.gradcheck(lambda one: silu_times(one, up.detach()), (gate,))
    assert torch.autograd.gradcheck(lambda one: silu_times(gate.detach(), one), (up,))
    assert torch.autograd.gradcheck(lambda one: rms_norm(rms_norm(one, weight, 1e-5) + one, weight, 1e-5), (x,))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 4, 32), (1, 0, 32)])
def test_types_and_shapes_of_a_norm(kind: torch.dtype, weights: torch.dtype, shape: tuple[int, ...]):
    draw = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(32).to(weights).requires_grad_(False)
    norm.weight.copy_(torch.randn(32, generator=draw))
    x = torch.randn(shape, generator=draw).to(kind).requires_grad_()
    wanted = norm(x)
    slope = torch.randn(shape, generator=draw).to(wanted.dtype)
    with lean_norms(norm):
        assert "forward" in norm.__dict__
        got = norm(x)
    assert got.dtype == wanted.dtype
    rounding = {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in (kind, weights) else {"rtol": 3e-3, "atol": 3e-3}
    rounding = {"rtol": 1e-5, "atol": 1e-6} if kind == weights == torch.float32 else rounding
    torch.testing.assert_close(got, wanted, **rounding)
    slopes = [torch.autograd.grad(one, x, slope)[0] for one in (got, wanted)]
    torch.testing.assert_close(*slopes, **rounding)


@pytest.mark.parametrize(("kind", "fewer"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_norm_keeps_its_input_as_it_is(kind: torch.dtype, fewer: bool):
    norm, kept = LlamaRMSNorm(32).to(kind).requires_grad_(False), []
    for changed in (nullcontext(), lean_norms(norm)):
        held: dict[int, Any] = {}
        keep = lambda one, held=held: held.setdefault(one.untyped_storage().data_ptr(), one)  # noqa: E731
        with changed, saved_tensors_hooks(keep, lambda one: one):
            y = norm(torch.randn(64, 32).to(kind).requires_grad_())
        kept.append(sum(one.untyped_storage().nbytes() for one in held.values()))
        del y
    assert (kept[1] < 0.7 * kept[0]) if fewer else (kept[1] <= kept[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_lean_activation_is_the_blocks_own_bit_for_bit(kind: torch.dtype):
    block = tiny.llama(layers=1).model.layers[0].mlp.to(kind)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(kind).requires_grad_()
    found = []
    for _ in range(2):
        with lean_activations(block) if found else torch.enable_grad():
            out = block(x)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


def lean_ones(model: nn.Module) -> set[str]:
    with lean_norms(model), lean_activations(model):
        return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def test_which_modules_are_found():
    norms = {f"model.layers.{n}.{part}_layernorm" for n in (0, 1) for part in ("input", "post_attention")}
    blocks = {f"model.layers.{n}.mlp" for n in (0, 1)}
    llama = tiny.llama(layers=2)
    assert lean_ones(llama) == norms | blocks | {"model.norm"}
    heads = {f"model.layers.{n}.self_attn.{part}_norm" for n in (0, 1) for part in "qk"}
    qwen = Qwen3ForCausalLM(Qwen3Config(**SMALL)).requires_grad_(False)
    assert lean_ones(qwen) == norms | blocks | heads | {"model.norm"}
    assert lean_ones(qwen.to("meta")) == norms | blocks | heads | {"model.norm"}, "plans know no numbers"
    gemma = GemmaForCausalLM(GemmaConfig(**SMALL)).requires_grad_(False)
    assert lean_ones(gemma) == set(), "norms of w + 1, gates of gelu"
    small = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    assert lean_ones(GPT2LMHeadModel(small).requires_grad_(False)) == set()


def test_norms_that_train_are_left_alone():
    model = tiny.llama(layers=1)
    model.model.norm.weight.requires_grad_()
    assert "model.norm" not in lean_ones(model)
    with lean_norms(model):
        first = model.model.layers[0].input_layernorm
        first.weight.requires_grad_()  # thawed on the way
        first(torch.randn(2, 32)).sum().backward()
        assert first.weight.grad is not None
        other = nn.Parameter(torch.full((32,), 2.0), requires_grad=False)
        norm, x = model.model.layers[0].post_attention_layernorm, torch.randn(2, 32)
        wanted = 2 * norm(x)
        norm.weight = other  # another weight than the one that was tried
        torch.testing.assert_close(norm(x), wanted)


@torch.no_grad()
def test_norms_that_compute_something_else_are_left_alone():
    class Centred(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(-1, keepdim=True))  # type: ignore[no-any-return]

    class Gated(LlamaRMSNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            y: Tensor = super().forward(x)
            return y if gate is None else y * gate

    class Dropping(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    class Clamping(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(-1e3, 1e3))  # type: ignore[no-any-return]

    class WithoutEpsilon(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt()

    norms = [kind(32).requires_grad_(False).eval() for kind in (Centred, Dropping, Clamping, WithoutEpsilon)]
    norms += [nn.LayerNorm(32, bias=bias).requires_grad_(False) for bias in (True, False)]
    for norm in norms:
        assert lean_ones(norm) == set(), type(norm).__name__
    assert not any(norm.training for norm in norms[:4])
    gated, x = Gated(32).requires_grad_(False), torch.randn(2, 32)
    wanted = gated(x, 3 * x)
    with lean_norms(gated):
        assert "forward" in gated.__dict__
        assert torch.equal(gated(x, gate=3 * x), wanted), "what was not tried is the norm's own"
    olmo = Olmo2ForCausalLM(Olmo2Config(**SMALL)).model.norm.requires_grad_(False)
    x = torch.randn(2, 32).bfloat16()
    with lean_norms(olmo):
        assert olmo(x).dtype == torch.bfloat16, "its weight is multiplied in before the rounding"


def test_blocks_that_compute_something_else_are_left_alone():
    block = tiny.llama(layers=1).model.layers[0].mlp

    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2)  # type: ignore[no-any-return]

    class Dropping(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(nn.functional.dropout(self.act_fn(self.gate_proj(x)), 0.5, self.training))  # type: ignore[no-any-return]

    class Clamping(LlamaMLP):
        """As in several bases, at 7 to 16."""

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-16, 16))  # type: ignore[no-any-return]

    class ClampingTheGate(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1e3)) * self.up_proj(x))  # type: ignore[no-any-return]

    for kind in (Scaled, Dropping, Clamping, ClampingTheGate):
        assert lean_ones(kind(block.config)) == set(), kind.__name__
    seen: list[int] = []
    watched = copy.deepcopy(block)
    handle = watched.act_fn.register_forward_hook(lambda *_: seen.append(1))
    assert lean_ones(watched) == set(), "somebody looks at the activation"
    handle.remove()
    assert lean_ones(watched) == {""}
    assert not seen


def test_all_is_put_back_and_hooks_see_what_they_saw():
    model = tiny.moa()
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[str] = []
    norm, block = model.get_base_model().model.norm, model.get_base_model().model.layers[0].mlp
    for module in (norm, block):
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
        module.register_forward_hook(lambda *_: seen.append("after"))
    kept = norm.forward = norm.forward  # somebody's own
    ids = tiny.ids()

    def inside() -> None:
        with while_learning(model, TrainingSettings(shared_inputs=False), apart=True):
            assert not seen, "trying runs nobody's hooks"
            assert norm.forward is kept
            assert "forward" in block.__dict__
            model(input_ids=ids, labels=tiny.labels(ids), domain_ids=torch.tensor([0, 1, 2]))
            assert seen.count("before") == seen.count("after") > 0
            raise KeyError("something")

    with pytest.raises(KeyError, match="something"):
        inside()
    assert norm.__dict__.pop("forward") is kept
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_copy_made_meanwhile_is_a_model_of_its_own():
    """As callbacks that average weights make them."""
    model = built("lora").train()
    ids = tiny.ids(2, 6)
    with while_learning(model, TrainingSettings(), apart=False):
        copied = copy.deepcopy(model)
        wanted = model(input_ids=ids).logits.detach()
        for name, parameter in copied.named_parameters():
            if "loramix_bank" in name and "mlp" in name:
                nn.init.zeros_(parameter)
        logits = copied(input_ids=ids).logits
        logits.square().sum().backward()
    assert not torch.allclose(logits, wanted), "its own experts are used"
    assert all(one.grad is None for one in model.parameters())
    assert all(one.grad is not None for one in copied.parameters() if one.requires_grad)


def test_switches():
    model = tiny.llama(layers=1)
    for settings, wanted in (
        (TrainingSettings(), {"LlamaRMSNorm", "LlamaMLP"}),
        (TrainingSettings(lean_norms=False), {"LlamaMLP"}),
        (TrainingSettings(lean_activations=False), {"LlamaRMSNorm"}),
        (TrainingSettings(torch_compile=True), set()),
    ):
        with while_learning(model, settings, apart=False):
            changed = {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}
        assert changed == wanted
    assert {"lean_norms", "lean_activations"} <= TrainingSettings().learned().keys()
