"""Every method in and out: saved and loaded bit for bit, checkpointed, in bfloat16, through transformers' own door."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from loramix import LoramixConfig
from loramix.losses import AUXILIARY, Seen
from loramix.methods import method_named
from tests import method_cases as cases
from tests import tiny
from tests.method_cases import CASES


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, domain_ids=torch.tensor([0, 1, 2])).logits


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_is_bit_equal(name: str, tmp_path: Path):
    ids = tiny.ids()
    model = cases.build(name, tiny.llama(layers=2)).eval()
    wanted = _logits(model, ids)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny.llama(layers=2), str(tmp_path), low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(_logits(again, ids), wanted)


@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_all_that_was_trained_and_nothing_of_the_base(name: str, tmp_path: Path):
    model = cases.build(name, tiny.llama(layers=2))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".loramix_bank." in key or ".loramix_router." in key for key in saved)
    own = {n.replace(".default", ""): p for n, p in model.state_dict().items() if ".loramix_" in n}
    assert set(saved) == set(own)
    assert all(torch.equal(saved[key], own[key]) for key in own)


@pytest.mark.parametrize("name", CASES)
def test_transformers_door_is_bit_equal(name: str, tmp_path: Path):
    ids = tiny.ids()
    tiny.llama(layers=2).save_pretrained(tmp_path / "base")
    base = type(tiny.llama()).from_pretrained(tmp_path / "base").eval()
    model = cases.build(name, base).eval()
    wanted = _logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    again = type(tiny.llama()).from_pretrained(tmp_path / "base").eval()
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(_logits(again.eval(), ids), wanted)


@pytest.mark.parametrize("name", ["arrow", "mola"])
def test_transformers_add_adapter_saves_and_loads(name: str, tmp_path: Path):
    ids = tiny.ids()
    tiny.llama(layers=2).save_pretrained(tmp_path / "base")
    model = type(tiny.llama()).from_pretrained(tmp_path / "base").eval()
    model.add_adapter(LoramixConfig(method=name, r=4, init_lora_weights=False, **CASES[name].settings))
    for module in model.modules():
        if hasattr(module, "loramix_router") and hasattr(module.router("default"), "prototypes_EI"):
            module.router("default").prototypes_EI.normal_()
    wanted = _logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter")
    again = type(tiny.llama()).from_pretrained(tmp_path / "base").eval()
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(_logits(again.eval(), ids), wanted)
    assert not torch.allclose(wanted, tiny.llama(layers=2)(ids).logits, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mola"])
def test_two_methods_on_one_base_do_not_meet(name: str):
    """A second adapter beside mola's gives what it gives alone, and so does mola afterwards."""
    ids = tiny.ids()
    other, model = (cases.build(n, tiny.llama(layers=2)).eval() for n in (name, "mola"))
    wanted = {"second": _logits(other, ids), "default": _logits(model, ids)}
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **CASES[name].settings}
    model.add_adapter("second", LoramixConfig(method=name, **settings))
    own = {n.replace(".default", ".second"): t for n, t in other.state_dict().items() if ".loramix_" in n}
    assert not model.load_state_dict(own, strict=False).unexpected_keys
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        assert torch.equal(_logits(model.eval(), ids), wanted[adapter])


def test_routings_are_those_of_the_last_forward():
    """An adapter without routers leaves none behind, nor does the base alone."""
    model = cases.build("mola", tiny.llama(layers=2))
    model.add_adapter("plain", LoramixConfig(method="lora", r=4))
    model(input_ids=tiny.ids())
    assert len(model.routings) == 14
    with model.disable_adapter():
        model(input_ids=tiny.ids())
        assert model.routings == {}
    model(input_ids=tiny.ids())
    model.set_adapter("plain")
    model(input_ids=tiny.ids())
    assert model.routings == {}


# ---- activation checkpointing -------------------------------------------------------------------------------------


def _gradients(name: str, checkpointed: bool, backend: str, forwards: int) -> dict[str, Tensor]:
    """Loss and gradients in training, with all the dropout the method has."""
    dropout = {"lora_dropout": 0.1}
    if name in ("mosld", "mosld-b"):
        dropout["bank"] = {"weight_dropout": 0.2}
    if name == "sira":
        dropout["router"] = {"gate_dropout": 0.3}
    base = tiny.llama(layers=2)
    model = cases.build(name, base, backend=backend, **dropout).train()
    model.enable_input_require_grads()
    if checkpointed:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(11)
    total = torch.zeros(())
    for turn in range(forwards):
        ids, domains = tiny.ids(3, 8).roll(turn, 0), torch.tensor([turn, 1, 2])
        out = model(input_ids=ids, labels=tiny.labels(ids), domain_ids=domains)
        seen = Seen(model.routings, model.expert_outputs, domains, torch.tensor([0, 1, 1]))
        losses = set(CASES[name].losses) & (set(method_named(name).losses) | {"load_balance"})
        total = total + out.loss + sum(AUXILIARY[loss].value(seen) for loss in sorted(losses))
    total.backward()
    return {"loss": total.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("name", [name for name in CASES if name != "arrow"])
def test_checkpointing_changes_nothing(name: str):
    wanted = _gradients(name, checkpointed=False, backend="auto", forwards=2)
    got = _gradients(name, checkpointed=True, backend="auto", forwards=2)
    assert got.keys() == wanted.keys()
    for part, value in got.items():
        assert torch.equal(value, wanted[part]), part


@pytest.mark.parametrize("name", cases.IDLE)
def test_checkpointing_changes_nothing_in_grouped_experts(name: str):
    wanted = _gradients(name, checkpointed=False, backend="grouped", forwards=1)
    got = _gradients(name, checkpointed=True, backend="grouped", forwards=1)
    for part, value in got.items():
        assert torch.equal(value, wanted[part]), part


# ---- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_bfloat16_base_stays_bfloat16_and_trains(name: str):
    ids = tiny.ids()
    exact = _logits(cases.build(name, tiny.llama(layers=2)).eval(), ids)
    base = tiny.llama(layers=2).to(torch.bfloat16)
    model = cases.build(name, base, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    logits = _logits(model, ids)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.1 * exact.abs().mean()
    model.enable_input_require_grads()
    out = model.train()(input_ids=ids, labels=ids, domain_ids=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "backend"), [*product(CASES, ["auto"]), *product(cases.TOKEN_ROUTED, ["grouped"])])
def test_autocast_trains(name: str, backend: str):
    ids = tiny.ids()
    model = cases.build(name, tiny.llama(layers=2), backend=backend, r=8).train()
    model.enable_input_require_grads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=ids, labels=ids, domain_ids=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
