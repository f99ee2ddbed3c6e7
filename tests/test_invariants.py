"""What must hold of any mixture: identity at the start, causality, padding, neighbours, cache, one-hot, permutation."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loramix import LoramixConfig
from loramix.tuner.assembly import put_experts, take_expert
from tests import tiny


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("method", ["moa", "lora"])
def test_identity_at_initialisation_is_bitwise(make, method):
    ids = tiny.ids()
    wanted = make()(ids).logits
    experts = tiny.EXPERTS if method == "moa" else ["one"]
    model = get_peft_model(make(), LoramixConfig(method=method, experts=experts)).eval()
    assert torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("backend", ["loop", "concat", "per_sequence"])
def test_one_expert_is_pefts_lora(backend):
    ids = tiny.ids()
    theirs = get_peft_model(
        tiny.llama(), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ours = get_peft_model(tiny.llama(), LoramixConfig(method="lora", r=4, lora_alpha=16, backend=backend))
    pairs = []
    for name, module in ours.get_base_model().named_modules():
        if hasattr(module, "loramix_bank"):
            their = theirs.get_base_model().get_submodule(name)
            bank = module.bank("default")
            down, up = their.lora_A["default"].weight, their.lora_B["default"].weight
            torch.nn.init.normal_(up, std=0.1)
            bank.A_ERI.data[0], bank.B_EOR.data[0] = down.data, up.data
            pairs.append((bank, down, up))
    assert len(pairs) == 21
    their_out, our_out = theirs(input_ids=ids, labels=ids), ours(input_ids=ids, labels=ids)
    torch.testing.assert_close(our_out.logits, their_out.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_out.loss, their_out.loss, rtol=1e-6, atol=1e-6)
    their_out.loss.backward()
    our_out.loss.backward()
    for bank, down, up in pairs:
        torch.testing.assert_close(bank.A_ERI.grad[0], down.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bank.B_EOR.grad[0], up.grad, rtol=1e-4, atol=1e-6)


def test_pinned_expert_is_that_expert_alone():
    mixture = tiny.moa()
    ids = tiny.ids()
    for position in range(len(tiny.EXPERTS)):
        alone = get_peft_model(tiny.llama(), LoramixConfig(method="lora", experts=["it"], r=4)).eval()
        expert = take_expert(mixture.get_base_model(), "default", position)
        put_experts(alone.get_base_model(), "default", {"it": expert})
        labels = torch.full((len(ids),), position)
        got = mixture(input_ids=ids, domain_ids=labels).logits
        torch.testing.assert_close(got, alone(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads", ["base", "experts"])
@pytest.mark.parametrize("decision", ["last", "vote", "per_layer", "layer:1"])
def test_response_tokens_never_move_earlier_logits_nor_the_routing(reads, decision):
    model = tiny.moa(router={"reads": reads})
    ids = tiny.ids()
    prompt_mask = torch.arange(10)[None].expand(3, 10) < 6
    changed = ids.clone()
    changed[:, 8:] = tiny.ids(3, 10).flip(1)[:, 8:]
    how = {"prompt_mask": prompt_mask, "decision": decision}
    before, routed = model(input_ids=ids, **how).logits, {k: r.ids for k, r in model.routings.items()}
    after, again = model(input_ids=changed, **how).logits, {k: r.ids for k, r in model.routings.items()}
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=0, atol=0)
    assert not torch.equal(after[:, 8:], before[:, 8:])
    assert all(torch.equal(routed[k], again[k]) for k in routed)


@pytest.mark.parametrize("reads", ["base", "experts"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batch_neighbours_do_not_matter(reads, pooling):
    model = tiny.moa(router={"reads": reads, "pooling": pooling})
    ids = tiny.ids(4)
    together = model(input_ids=ids).logits
    routes = model.route(input_ids=ids)
    for row in range(4):
        alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
        assert model.route(input_ids=ids[row : row + 1])[0].expert == routes[row].expert


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("reads", ["base", "experts"])
def test_padding_does_not_matter(make, side, pooling, reads):
    model = tiny.moa(make(), router={"reads": reads, "pooling": pooling})
    ids = tiny.ids(2, 6)
    pad = torch.full((2, 3), tiny.PAD)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (padded != tiny.PAD).long()
    real = slice(3, 9) if side == "left" else slice(0, 6)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = model(input_ids=ids).logits
    got = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, real]
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)
    wanted = [route.votes for route in model.route(input_ids=ids)]
    assert [route.votes for route in model.route(input_ids=padded, attention_mask=mask)] == wanted


@pytest.mark.parametrize("decision", ["last", "vote", "per_layer", "layer:0"])
@pytest.mark.parametrize("reads", ["base", "experts"])
def test_cache_on_and_off_give_the_same_tokens(decision, reads):
    model = tiny.moa(router={"reads": reads})
    ids = torch.cat([torch.full((3, 2), tiny.PAD), tiny.ids(3, 6)], dim=1)
    ids[0, :2] = torch.tensor([5, 6])
    how = {"max_new_tokens": 8, "do_sample": False, "decision": decision, "pad_token_id": tiny.PAD}
    how["attention_mask"] = (ids != tiny.PAD).long()
    cached = model.generate(input_ids=ids, use_cache=True, **how)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **how))


def test_rows_with_different_experts_generate_as_alone():
    model = tiny.moa()
    ids = tiny.ids(3, 6)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD, "min_new_tokens": 6}
    together = model.generate(input_ids=ids, expert=tiny.EXPERTS, **how)
    for row, expert in enumerate(tiny.EXPERTS):
        alone = model.generate(input_ids=ids[row : row + 1], expert=expert, **how)
        assert torch.equal(alone[0], together[row])
    pinned_red = model.generate(input_ids=ids, expert="red", **how)
    assert torch.equal(pinned_red[0], together[0])
    assert not torch.equal(pinned_red, together)


def test_beams_follow_their_prompt():
    model = tiny.moa()
    ids = tiny.ids(3, 6)
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": tiny.PAD}
    together = model.generate(input_ids=ids, expert=tiny.EXPERTS, min_new_tokens=5, **how)
    assert together.shape[0] == 6
    for row, expert in enumerate(tiny.EXPERTS):
        alone = model.generate(input_ids=ids[row : row + 1], expert=expert, min_new_tokens=5, **how)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


def test_generate_holds_what_route_says():
    model = tiny.moa()
    ids = tiny.ids(4, 7)
    routes = model.route(input_ids=ids)
    assert len({route.expert for route in routes}) > 1, "the case would prove nothing"
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
    routed = model.generate(input_ids=ids, **how)
    assert torch.equal(routed, model.generate(input_ids=ids, expert=[r.expert for r in routes], **how))


def test_permuting_experts_changes_nothing():
    model = tiny.moa()
    ids = tiny.ids(3)
    before, routes = model(input_ids=ids).logits, model.route(input_ids=ids)
    turned = [2, 0, 1]
    for module in model.get_base_model().modules():
        if hasattr(module, "loramix_bank"):
            bank = module.bank("default")
            bank.A_ERI.data, bank.B_EOR.data = bank.A_ERI.data[turned], bank.B_EOR.data[turned]
            if "default" in module.loramix_router:
                router = module.router("default")
                router.w_out_EH.data = router.w_out_EH.data[turned]
    model.peft_config["default"].experts = [tiny.EXPERTS[i] for i in turned]
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert [r.expert for r in model.route(input_ids=ids)] == [r.expert for r in routes]


def test_reading_goes_no_deeper_than_the_decision_needs():
    for reads in ("base", "experts"):
        model = tiny.moa(router={"reads": reads})
        ran = []
        for number, layer in enumerate(model.get_base_model().model.layers):
            layer.mlp.register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
        votes = model.route(input_ids=tiny.ids(), decision="layer:1")[0].votes
        assert list(votes) == ["layers.0", "layers.1"]
        assert ran == [0]
        ran.clear()
        model.route(input_ids=tiny.ids(), decision="last")
        assert ran == [0, 1]


def test_disabled_adapter_is_the_base_and_routes_nothing():
    model = tiny.moa()
    ids = tiny.ids()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, tiny.llama()(ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, tiny.llama()(ids).logits)


def test_a_bfloat16_base_keeps_its_type_and_starts_as_itself():
    ids = tiny.ids()
    wanted = tiny.llama().to(torch.bfloat16)(ids).logits
    model = get_peft_model(tiny.llama().to(torch.bfloat16), LoramixConfig(experts=tiny.EXPERTS)).eval()
    got = model(input_ids=ids).logits
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "loramix_" in n)


def test_decoding_follows_the_cache_it_goes_on_with():
    model = tiny.moa()
    first, second = tiny.ids(1, 7), tiny.ids(6, 7)[5:]
    assert model.route(input_ids=first)[0].expert != model.route(input_ids=second)[0].expert

    def step(cache, token):
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    token = torch.tensor([[9]])
    cache = model(input_ids=first, use_cache=True).past_key_values
    wanted = step(cache, token)
    cache = model(input_ids=first, use_cache=True).past_key_values
    model(input_ids=second, use_cache=True)
    assert torch.equal(step(cache, token), wanted)


def test_generating_on_a_filled_cache_keeps_its_experts():
    model = tiny.moa()
    ids = tiny.ids(1, 7)
    expert = next(e for e in tiny.EXPERTS if e != model.route(input_ids=ids)[0].expert)
    label = torch.tensor([tiny.EXPERTS.index(expert)])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
    cache = model(input_ids=ids[:, :6], domain_ids=label, use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **how), model.generate(ids, expert=expert, **how))
