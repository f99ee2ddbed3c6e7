"""What must hold of every method: reductions, permutation, padding, neighbours, causality, cache, idle experts."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from loramix import LoramixConfig
from loramix.losses import AUXILIARY, Seen, load_balance
from loramix.routers import CapacityRouterConfig, Site
from loramix.routing import Call
from tests import method_cases as cases
from tests import tiny
from tests.method_cases import CASES

CHOSEN = [name for name in CASES if "experts" not in CASES[name].settings and name != "lora"]
"""Methods with any number of experts."""
ONE_EXPERT = {"mosld": {"bank": {"weight_dropout": 0.0}}, "mosld-b": {"bank": {"weight_dropout": 0.0}}}
LIMITED = {"router": {"gate_dropout": 0.0, "capacity_factor": 0.6, "eval_capacity_factor": 0.6}}
"""SiRA with so little room that tokens are dropped, at evaluation too."""


def _model(name: str, **settings: object) -> PeftModel:
    return cases.build(name, tiny.llama(layers=2), **settings).eval()


def _logits(model: PeftModel, ids: Tensor, **how: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, domain_ids=torch.arange(len(ids)) % 3, **how).logits


def _parts(model: PeftModel) -> list[tuple[torch.nn.Module, torch.nn.Module | None]]:
    """The bank, and the router if there is one, of each adapted module."""
    found = [m for m in model.get_base_model().modules() if hasattr(m, "loramix_bank")]
    return [(m.bank("default"), m.loramix_router["default"] if len(m.loramix_router) else None) for m in found]


# ---- reductions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "concat"])
@pytest.mark.parametrize("name", CHOSEN)
def test_one_expert_is_lora(name: str, backend: str):
    case = CASES[name]
    settings = {k: v for k, v in case.settings.items() if k in ("domains",)} | ONE_EXPERT.get(name, {})
    router = {} if "top_k" not in _router_settings(name) else {"router": {"top_k": 1}}
    if name == "sira":
        router = {"router": {"top_k": 1, "gate_dropout": 0.0}}
    how = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "init_lora_weights": False}
    torch.manual_seed(0)
    mixture = get_peft_model(
        tiny.llama(layers=2),
        LoramixConfig(method=name, num_experts=1, allocation=None, backend=backend, **how, **settings, **router),
    )
    plain = get_peft_model(
        tiny.llama(layers=2), LoramixConfig(method="lora", target_modules=[*case.routed, *case.plain], **how)
    )
    own, lora = _parts(mixture), _parts(plain)
    assert len(own) == len(lora)
    for (bank, _), (one, _) in zip(own, lora, strict=True):
        one.A_ERI.data, one.B_EOR.data = bank.A_ERI.data.clone(), bank.B_EOR.data.clone()
    ids = tiny.ids()
    outs = [m.train()(input_ids=ids, domain_ids=torch.tensor([0, 1, 2]), labels=ids) for m in (mixture, plain)]
    torch.testing.assert_close(outs[0].logits, outs[1].logits, rtol=1e-5, atol=1e-6)
    for out in outs:
        out.loss.backward()
    for (bank, _), (one, _) in zip(own, lora, strict=True):
        torch.testing.assert_close(bank.A_ERI.grad, one.A_ERI.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bank.B_EOR.grad, one.B_EOR.grad, rtol=1e-4, atol=1e-6)


def _router_settings(name: str) -> dict[str, object]:
    return LoramixConfig(method=name, **CASES[name].settings).router


def test_all_of_the_top_are_the_soft_mixture():
    ids = tiny.ids()
    sparse = _model("mola", allocation=None, num_experts=4, router={"top_k": 4})
    dense = _model("molora")
    dense.load_state_dict(sparse.state_dict())
    for model in (sparse, dense):
        model(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(_logits(sparse, ids), _logits(dense, ids), rtol=1e-5, atol=1e-6)
    of_dense = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, of_dense[name].grad, rtol=1e-4, atol=1e-6)


def test_capacity_for_all_is_top_k_with_its_probabilities():
    ids = tiny.ids()
    sira = _model("sira", router={"gate_dropout": 0.0, "capacity_factor": 100.0})
    plain = _model("mola", allocation=None, num_experts=4, router={"weighting": "probability"})
    plain.load_state_dict(sira.state_dict())
    torch.testing.assert_close(_logits(sira.train(), ids), _logits(plain, ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_the_base(name: str):
    ids = tiny.ids()
    wanted = tiny.llama(layers=2)(ids).logits
    settings = {"r": 4, **CASES[name].settings}
    model = get_peft_model(tiny.llama(layers=2), LoramixConfig(method=name, **settings))
    torch.testing.assert_close(_logits(model.eval(), ids), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(_logits(model.train(), ids), wanted, rtol=0, atol=1e-6)


# ---- permutation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "grouped"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "lora"])
def test_permuting_experts_changes_nothing(name: str, backend: str):
    if name not in cases.TOKEN_ROUTED:
        backend = "auto"
    model = _model(name, backend=backend, **(LIMITED if name == "sira" else {}))
    ids = tiny.ids()
    before = _logits(model, ids)
    for bank, router in _parts(model):
        order = torch.randperm(bank.num_experts) if CASES[name].scope == "module" else torch.tensor([2, 0, 1])
        order = order if bank.num_experts > 1 else torch.tensor([0])
        for parameter in bank.parameters():
            parameter.data = parameter.data[order] if len(parameter) > 1 else parameter.data
        if router is not None:
            _permute(router, order)
    # The order of experts is the order of sums in fp32, whose rounding MoLE's gates, which read outputs, magnify: up to
    # 1e-5 of the largest logit, by processor. Experts that do not go with their router are off by half of it and more.
    torch.testing.assert_close(_logits(model, ids), before, rtol=0, atol=1e-4 * before.abs().max().item())


def _permute(router: torch.nn.Module, order: Tensor) -> None:
    """Renames the experts of a router: its rows, and the columns that read an expert's output."""
    for name in ("w_EI", "w_EH", "w_EX", "prototypes_EI", "weights_E"):
        if hasattr(router, name):
            getattr(router, name).data = getattr(router, name).data[order]
    if hasattr(router, "w_EX"):
        blocks = router.w_EX.data.view(len(order), len(order), -1)
        router.w_EX.data = blocks[:, order].flatten(1)


# ---- padding, neighbours, causality, cache ------------------------------------------------------------------------


def _variants(name: str) -> list[PeftModel]:
    """The model at evaluation; of SiRA also in training and with little room."""
    if name != "sira":
        return [_model(name)]
    return [_model(name), _model(name, **LIMITED), _model(name, **LIMITED).train()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_padding_does_not_matter(name: str, side: str):
    ids = tiny.ids(3, 8)
    pad = torch.full((3, 5), tiny.PAD)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (padded != tiny.PAD).long()
    real = slice(5, 13) if side == "left" else slice(0, 8)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for model in _variants(name):
        got = _logits(model, padded, attention_mask=mask, position_ids=positions)[:, real]
        torch.testing.assert_close(got, _logits(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_neighbours_do_not_matter(name: str):
    ids = tiny.ids(3, 8)
    for model in _variants(name):
        together = _logits(model, ids)
        for row in range(3):
            with torch.no_grad():
                alone = model(input_ids=ids[row : row + 1], domain_ids=torch.tensor([row])).logits
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_later_tokens_do_not_change_earlier_logits(name: str):
    ids = tiny.ids(3, 8)
    changed = ids.clone()
    changed[:, 5:] = ids.flip(0)[:, :3]
    for model in _variants(name):
        before, after = _logits(model, ids), _logits(model, changed)
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_decoding_on_the_cache_is_the_whole_forward(name: str):
    model, ids = _model(name), tiny.ids(3, 9)
    ids[0, :2] = tiny.PAD
    mask = (ids != tiny.PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    wanted = _logits(model, ids, attention_mask=mask, position_ids=positions)
    cache, steps = None, [slice(0, 5), *(slice(t, t + 1) for t in range(5, 9))]
    for step in steps:
        how = {"attention_mask": mask[:, : step.stop], "position_ids": positions[:, step], "past_key_values": cache}
        with torch.no_grad():
            out = model(input_ids=ids[:, step], domain_ids=torch.tensor([0, 1, 2]), use_cache=True, **how)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[1:], wanted[1:, step], rtol=1e-4, atol=1e-5)
        real = mask[0, step].bool()
        torch.testing.assert_close(out.logits[0, real], wanted[0, step][real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_generation_with_and_without_cache_and_beams(name: str):
    model, ids = _model(name), tiny.ids(3, 6)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": tiny.PAD, "num_beams": 2}
    how["attention_mask"] = torch.ones_like(ids)
    if name == "moelora-task":
        how["domain_ids"] = torch.tensor([0, 1, 2])
    cached = model.generate(input_ids=ids, use_cache=True, **how)
    assert cached.shape == (3, 10)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **how))


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "concat", "loop", "grouped"])
@pytest.mark.parametrize("name", cases.IDLE)
def test_an_idle_expert_has_a_zero_gradient_not_none(name: str, backend: str):
    named = "experts" in CASES[name].settings
    many = {"experts": [f"e{i}" for i in range(8)]} if named else {"num_experts": 8, "allocation": None}
    router = {"top_k": 1, "gate_dropout": 0.0} if name == "sira" else {"top_k": 1}
    model = _model(name, backend=backend, router=router, **many).train()
    ids = tiny.ids(1, 3)
    loss = model(input_ids=ids, labels=ids).loss
    (loss + load_balance(model.routings.values())).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    idle = 0
    for module in model.get_base_model().modules():
        if hasattr(module, "loramix_bank") and module.loramix_places["default"].scope is not None:
            used = model.routings[module.loramix_places["default"].scope].ids.unique().tolist()
            for parameter in module.bank("default").parameters():
                unused = set(range(len(parameter))) - set(used) if len(parameter) > 1 else set()
                assert not any(parameter.grad[e].any() for e in unused)
                assert parameter.grad.any()
                idle += len(unused)
    assert idle > 0


@pytest.mark.parametrize("name", CASES)
def test_what_the_last_stage_trains(name: str):
    trained = {n for n, p in _model(name).named_parameters() if p.requires_grad}
    wanted = {
        n for n, _ in _model(name).named_parameters() if any(f".loramix_{part}." in n for part in CASES[name].trains)
    }
    assert trained == wanted


@pytest.mark.parametrize("loss", ["load_balance", "router_z", "localized_balance", "gate_balance", "contrastive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_do_not_count_padding(loss: str, side: str):
    name = {"gate_balance": "mole", "contrastive": "moelora-contrastive"}.get(loss, "mola")
    ids = tiny.ids(2, 5)
    pad = torch.full((2, 4), tiny.PAD)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (padded != tiny.PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    values = []
    for given in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask, "position_ids": positions}):
        model = _model(name).train()
        model(**given)
        seen = Seen(model.routings, model.expert_outputs, torch.tensor([0, 1]), torch.tensor([0, 1]))
        values.append(AUXILIARY[loss].value(seen))
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-6)


def test_a_gate_that_was_dropped_takes_no_room(monkeypatch):
    """The first token keeps one gate of three, so its second choice has weight zero. Which expert that is, is a tie
    that torch.topk breaks as it likes; nobody is served by it, so it must not keep the second token out."""
    router = CapacityRouterConfig(top_k=2, capacity_factor=0.5, gate_dropout=0.5).build(Site(3, 3, 3)).train()
    kept = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda gates, *_, **__: gates * kept)
    call = Call(torch.ones(1, 2).bool(), torch.ones(1, 2).bool())
    routing = router(torch.randn(1, 2, 3), call, "here", lambda: torch.zeros(()))
    gates = routing.gates(3)
    assert gates[0, 0] > 0
    assert (gates[1, 1:] > 0).all(), "each expert has room for one token, and neither had served any"
