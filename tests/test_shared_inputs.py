"""Modules that read the same input, worked out together, give what each gives alone: loss, log and all gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from loramix import LoramixConfig
from loramix.data.collation import Collator
from loramix.data.padding_free import PaddingFreeCollator
from loramix.experts import fused as fused_module
from loramix.methods import METHODS
from loramix.training.settings import TrainingSettings
from loramix.tuner.layer import LoramixLinear
from loramix.tuner.shared_inputs import shared_inputs
from tests import method_cases as cases
from tests import tiny
from tests.test_padding_free import built, examples, learned

Q, K, V = "q_proj", "k_proj", "v_proj"


def layers(model: Any) -> dict[str, LoramixLinear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, LoramixLinear)}


def leaves(model: Any) -> dict[str, list[str]]:
    """Who runs for whom, by the last parts of their names."""
    return {
        name.rpartition(".")[2]: [other.name.rpartition(".")[2] for other in one.followers]
        for name, one in layers(model).items()
        if one.followers
    }


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many layers each call of the fused function is for."""
    seen: list[int] = []
    true = fused_module._Fused.forward

    def forward(ctx: Any, x: Tensor, drop: Any, way: Any, types: Any, scalings: tuple[float, ...], *rest: Any) -> Any:
        seen.append(len(scalings))
        return true(ctx, x, drop, way, types, scalings, *rest)

    monkeypatch.setattr(fused_module._Fused, "forward", staticmethod(forward))
    return seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", [*cases.CASES, "moa", "moa experts"])
def test_loss_and_gradients_are_those_of_each_module_alone(method: str, padded: bool, monkeypatch: pytest.MonkeyPatch):
    if not METHODS[method.split(maxsplit=1)[0]].trains:
        pytest.skip("nothing is trained")
    case = cases.CASES.get(method)
    names = case.losses if case else ("routing_cross_entropy",)
    losses = {name: 0.1 + 0.1 * number for number, name in enumerate(names)}
    collator = Collator(tiny.PAD) if padded else PaddingFreeCollator()
    found = []
    for wanted in (False, True):
        model = built(method)
        with monkeypatch.context() as patched, shared_inputs(model, wanted):
            seen = counted(patched)
            found.append(learned(model, collator(examples()), losses))
        if not wanted:
            assert max(seen, default=1) == 1
        elif method != "moelora-contrastive" and not (padded and method.startswith("moa")):
            assert max(seen) > 1, "nothing ran together, so nothing is shown"
    (alone, said_alone), (together, said) = found
    torch.testing.assert_close(said["loss"], said_alone["loss"])
    assert said["log"] == pytest.approx(said_alone["log"], rel=1e-4)
    assert together.keys() == alone.keys()
    for name, one in alone.items():
        torch.testing.assert_close(together[name], one, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_who_reads_the_same_is_found_and_forgotten():
    model = built("mola")
    with shared_inputs(model):
        assert leaves(model) == {Q: [K, V], "gate_proj": ["up_proj"]}
        assert len([one for one in layers(model).values() if one.followers]) == 4, "in each of two layers"
    assert leaves(model) == {}
    with pytest.raises(RuntimeError, match="on purpose"), shared_inputs(model):
        raise RuntimeError("on purpose")
    assert leaves(model) == {}
    with shared_inputs(model, wanted=False):
        assert leaves(model) == {}
    with shared_inputs(tiny.llama()):
        pass


def test_looking_changes_nothing():
    model = built("moa").train()
    before = {name: one.training for name, one in model.named_modules()}
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with shared_inputs(model):
        assert torch.equal(torch.rand(1), expected), "no random number is drawn"
    assert {name: one.training for name, one in model.named_modules()} == before
    assert [name for name, one in model.named_parameters() if one.requires_grad] == trained
    assert not any(one._forward_pre_hooks for one in layers(model).values())
    assert not any(one.disable_adapters for one in layers(model).values())


def test_a_module_that_runs_twice_shares_nothing():
    model = built("mola")
    base = model.get_base_model()
    base.model.layers.append(base.model.layers[0])
    base.config.num_hidden_layers = 3
    with shared_inputs(model):
        assert leaves(model) == {}


def test_another_input_than_expected_is_worked_out_for_itself():
    """What was kept for another tensor is not given to this one."""
    model = get_peft_model(tiny.llama(layers=1), LoramixConfig(method="lora", experts=["a"], target_modules=[Q, K]))
    first, second = (layers(model)[name] for name in layers(model))
    x, other = (torch.randn(1, 5, first.in_features, requires_grad=True) for _ in range(2))
    alone = second(other)
    with shared_inputs(model.train()):
        assert first.followers == (second,)
        first(x)
        assert second.name in second.context.ahead
        torch.testing.assert_close(second(other), alone)
        assert not second.context.ahead
    assert second(x).shape == alone.shape


def test_an_input_changed_in_place_meanwhile_is_another():
    model = get_peft_model(tiny.llama(layers=1), LoramixConfig(method="lora", experts=["a"], target_modules=[Q, K]))
    first, second = (layers(model)[name] for name in layers(model))
    x = torch.randn(1, 5, first.in_features)
    with shared_inputs(model.train()):
        first(x)
        x.mul_(2)
        torch.testing.assert_close(second(x), second(x.clone()))


def test_it_can_be_nested_and_leaves_merged_adapters_alone():
    model = get_peft_model(tiny.llama(layers=1), LoramixConfig(method="lora", experts=["a"], target_modules=[Q, K]))
    with shared_inputs(model):
        with shared_inputs(model):
            pass
        assert leaves(model) == {Q: [K]}
    model.merge_adapter()
    with shared_inputs(model):
        assert leaves(model) == {}
    assert all(one.merged for one in layers(model).values())


def test_reentrant_checkpointing_shares_nothing():
    """Its forward has no gradients, so it would drop other numbers than the backward's."""
    model = built("lora")
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    with shared_inputs(model.train()):
        assert leaves(model) == {}


@pytest.mark.parametrize("backend", ["auto", "grouped"])
def test_every_router_is_asked_once(backend: str):
    asked = []
    for wanted in (False, True):
        model = cases.build("mola", tiny.llama(layers=2), backend=backend)
        calls: list[int] = []
        for one in layers(model).values():
            one.loramix_router["default"].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with shared_inputs(model, wanted):
            learned(model, PaddingFreeCollator()(examples()), {})
        asked.append(len(calls))
    assert asked == [14, 14]


@pytest.mark.parametrize("method", ["lora", "mola", "mixlora", "moa"])
def test_a_backward_under_autocast_is_that_of_the_forwards_types(method: str):
    found = []
    for low in (False, True):
        model = built(method).train()
        with shared_inputs(model):
            told = {"domain_ids": torch.tensor([0, 1])} if method == "moa" else {}
            loss = model(input_ids=tiny.ids(2, 6), labels=tiny.labels(tiny.ids(2, 6)), **told).loss
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    for name, wanted in found[0].items():
        near = 5e-2 * wanted.abs().max().item() + 1e-6  # the base's own head and attention are in bf16 then
        torch.testing.assert_close(found[1][name], wanted, rtol=0, atol=near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["lora", "mola", "moa"])
def test_nothing_is_kept_after_a_forward(method: str):
    model = built(method)
    with shared_inputs(model):
        learned(model, PaddingFreeCollator()(examples()), {})
        assert not next(iter(layers(model).values())).context.ahead


@pytest.mark.parametrize("method", ["mola", "mosld", "moa"])
def test_activation_checkpointing_gives_the_same(method: str):
    found = []
    for checkpointing in (False, True):
        model = built(method)
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        torch.manual_seed(1)
        with shared_inputs(model):
            found.append(learned(model, PaddingFreeCollator()(examples()), {})[0])
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("method", ["lora", "mola", "mixlora", "moa"])
def test_dropout_is_the_plain_backends(method: str, together: bool, monkeypatch: pytest.MonkeyPatch):
    """The same masks, told by the shape of what they are drawn for, in the fast forms and in the slow ones."""
    from loramix.experts.dropping import InputDropout

    masks: dict[torch.Size, Tensor] = {}

    def draw(self: InputDropout, x: Tensor) -> Tensor | None:
        if not self.training or self.p == 0:
            return None
        made = torch.Generator().manual_seed(x.shape[-1])
        return masks.setdefault(x.shape, torch.rand(x.shape, generator=made) >= self.p)

    monkeypatch.setattr(InputDropout, "draw", draw)
    found = []
    for backend in ("auto", "loop"):
        if method == "moa":
            model = tiny.moa(tiny.llama(layers=2), lora_dropout=0.4, backend=backend)
        elif method == "lora":
            config = LoramixConfig(method="lora", experts=["a"], lora_dropout=0.4, init_lora_weights=False)
            model = get_peft_model(tiny.llama(layers=2), config)
            for one in layers(model).values():
                one.loramix_bank["default"].backend = backend
        else:
            model = cases.build(method, tiny.llama(layers=2), lora_dropout=0.4, backend=backend)
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        forms: AbstractContextManager[None] = shared_inputs(model) if together and backend == "auto" else nullcontext()
        with forms:
            found.append(learned(model, PaddingFreeCollator()(examples()), {}))
    torch.testing.assert_close(found[0][1]["loss"], found[1][1]["loss"])
    for name, wanted in found[1][0].items():
        torch.testing.assert_close(found[0][0][name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_it_can_be_switched_off():
    assert TrainingSettings().shared_inputs
    assert "shared_inputs" in TrainingSettings(shared_inputs=False).learned(), "a resumed run must keep it"
