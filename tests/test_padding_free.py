"""Rows one after the other in one long row give the loss and all gradients of the same rows padded, in every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loramix.data.collation import Collator, Example
from loramix.data.padding_free import PaddingFreeCollator
from loramix.data.prompts import Encoded
from loramix.errors import ConfigError
from loramix.experts.apply import choose, concat, loop
from loramix.experts.by_segment import ByRows, by_segment, weights_by_token
from loramix.experts.fused import Layer, fused
from loramix.experts.grouped import grouped
from loramix.methods import METHODS
from loramix.models.segment_attention import NAME, keeps_segments_apart, segment_attention
from loramix.routing import Routing
from loramix.segments import Segments
from loramix.training.arguments import training_arguments
from loramix.training.settings import TrainingSettings
from loramix.training.smaller_batches import in_parts, within
from loramix.training.trainer import MixtureTrainer
from loramix.tuner.guide import ForwardGuide
from tests import method_cases as cases
from tests import tiny

SIZES = [(9, 4), (5, 2), (12, 9), (7, 3)]
LABELS = [2, 0, 1, 2]


def examples(sizes: list[tuple[int, int]] = SIZES) -> list[Example]:
    draw = torch.Generator().manual_seed(5)
    made = []
    for (length, prompt), label in zip(sizes, LABELS, strict=False):
        ids = torch.randint(3, 64, (length,), generator=draw).tolist()
        made.append(Example(Encoded(ids, [n >= prompt for n in range(length)], prompt), label))
    return made


def built(method: str) -> Any:
    if method.startswith("moa"):
        router = {
            "reads": "experts" if "experts" in method else "base",
            "pooling": "mean" if "mean" in method else "last",
        }
        return tiny.moa(tiny.llama(layers=2), router=router)
    return cases.build(method, tiny.llama(layers=2))


def learned(model: Any, batch: dict[str, Any], losses: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradients of one step as training takes it, and what else it says."""
    chosen = TrainingSettings(max_steps=1)
    model.train()
    trainer = MixtureTrainer(
        model,
        settings=chosen,
        domains=tiny.EXPERTS,
        auxiliary=losses,
        kinds=[1, 0, 1],
        args=training_arguments(chosen, "unused"),
        train_dataset=[batch],
    )
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    model.zero_grad()
    with segment_attention(model):
        loss = trainer.compute_loss(model, batches[0])
        loss.backward()
    said = {"loss": loss.detach(), "tokens": trainer.tokens_seen, "log": trainer.tally.drain()}
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, said


def stepped(model: Any, losses: dict[str, float], most: int) -> tuple[dict[str, Tensor], int]:
    """The gradients of one step, and in how many parts it was learned."""
    chosen = TrainingSettings(max_steps=1, tokens_at_once=most)
    batch = PaddingFreeCollator()(examples())
    trainer = MixtureTrainer(
        model.train(),
        settings=chosen,
        domains=tiny.EXPERTS,
        auxiliary=losses,
        args=training_arguments(chosen, "unused"),
        train_dataset=[batch],
    )
    batches, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    asked: list[int] = []
    plain = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: asked.append(1) or plain(*args, **kwargs)  # type: ignore[method-assign,func-returns-value]
    model.zero_grad()
    with segment_attention(model):
        trainer.training_step(model, batches[0])
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, len(asked)


@pytest.mark.parametrize("method", [*cases.CASES, "moa", "moa experts", "moa mean"])
def test_loss_and_gradients_are_those_of_the_padded_batch(method: str):
    if not METHODS[method.split(maxsplit=1)[0]].trains:
        pytest.skip("nothing is trained")
    case = cases.CASES.get(method)
    names = case.losses if case else ("routing_cross_entropy",)
    losses = {name: 0.1 + 0.1 * number for number, name in enumerate(names)}
    padded, said_padded = learned(built(method), Collator(tiny.PAD)(examples()), losses)
    free, said_free = learned(built(method), PaddingFreeCollator()(examples()), losses)
    assert said_free["tokens"] == said_padded["tokens"] == sum(length for length, _ in SIZES)
    torch.testing.assert_close(said_free["loss"], said_padded["loss"])
    assert said_free["log"] == pytest.approx(said_padded["log"], rel=1e-4)
    assert free.keys() == padded.keys()
    assert any(float(one.abs().max()) > 1e-4 for one in free.values())
    for name, wanted in padded.items():
        torch.testing.assert_close(free[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["moa", "moa experts", "mosld", "sira", "mixlora"])
def test_a_row_does_not_see_its_neighbours(method: str):
    model = built(method).eval()
    batch = PaddingFreeCollator()(examples())
    kept = {
        "input_ids",
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "prompt_mask",
    }
    told = {name: value for name, value in batch.items() if name in kept}
    if method not in ("moa", "moa experts"):
        told.pop("prompt_mask")
    with torch.no_grad(), segment_attention(model):
        whole = model(**told, use_cache=False).logits[0]
    start = 0
    for example in examples():
        ids = torch.tensor([example.encoded.input_ids])
        alone = {"prompt_mask": torch.arange(example.length)[None] < example.encoded.prompt_length}
        with torch.no_grad():
            wanted = model(input_ids=ids, **(alone if "prompt_mask" in told else {})).logits[0]
        torch.testing.assert_close(whole[start : start + example.length], wanted, rtol=1e-4, atol=1e-5)
        start += example.length


def test_positions_that_begin_anew_are_rows_without_being_told():
    """What transformers' collator with flattening gives without flash attention's borders."""
    model = built("moa").train()
    batch = PaddingFreeCollator()(examples())
    asked = {name: batch[name] for name in ("input_ids", "position_ids", "labels", "domain_ids")}
    model(**asked).loss.backward()
    routing = next(iter(ForwardGuide.of(model.get_base_model()).context.current().routings.values()))
    assert routing.ids is not None
    assert routing.ids[:, 0].tolist() == LABELS
    assert routing.logits is not None
    assert len(routing.logits) == len(SIZES)


def test_labels_that_leave_a_row_without_prompt_are_refused():
    model = built("moa").train()
    batch = PaddingFreeCollator()(examples([(9, 4), (5, 0)]))
    labels = torch.where(torch.arange(14)[None] == 9, batch["input_ids"], batch["labels"])
    with pytest.raises(ConfigError, match="supervised from its first token"):
        model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            labels=labels,
            domain_ids=torch.tensor([2, 0]),
        )


def test_the_parts_of_a_long_row_are_the_batches_of_their_rows():
    made = examples()
    parts = list(in_parts(PaddingFreeCollator()(made), 3))
    assert [len(part["domain_ids"]) for part in parts] == [1, 1, 2]
    wanted = [PaddingFreeCollator()(some) for some in (made[:1], made[1:2], made[2:])]
    for part, right in zip(parts, wanted, strict=True):
        assert part.keys() == right.keys()
        for name, value in right.items():
            assert torch.equal(torch.as_tensor(part[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("collator", [Collator(tiny.PAD), PaddingFreeCollator()])
@pytest.mark.parametrize(("most", "rows"), [(0, [4]), (1000, [4]), (24, [2, 2]), (13, [1, 1, 1, 1])])
def test_no_part_is_longer_than_the_bound_but_a_longer_row(collator: Any, most: int, rows: list[int]):
    batch = collator(examples())
    parts = list(within(batch, most))
    assert [len(part["domain_ids"]) for part in parts] == rows
    assert torch.cat([part["domain_ids"] for part in parts]).tolist() == LABELS
    for part in parts:
        assert most == 0 or part["input_ids"].numel() <= most or len(part["domain_ids"]) == 1


@pytest.mark.parametrize("method", ["lora", "moa", "mola"])
def test_a_step_in_parts_is_the_step(method: str):
    """Losses that are sums; those on a batch's statistics are the parts' own."""
    losses = {"routing_cross_entropy": 0.1} if method == "moa" else {}
    whole, _ = stepped(built(method), losses, 0)
    parts, learned_parts = stepped(built(method), losses, 14)
    assert learned_parts == 3
    for name, wanted in whole.items():
        torch.testing.assert_close(parts[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_below_the_experts_keep_nothing():
    """The frozen beginning of a base costs no backward: autograd does not follow what needs no gradient."""
    model = cases.build("lora", tiny.llama(layers=3), layers_to_transform=[2])
    followed: dict[int, bool] = {}
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda _, __, out, n=number: followed.update({n: out.requires_grad}))
    learned(model, PaddingFreeCollator()(examples()), {})
    assert followed == {0: False, 1: False, 2: True}


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_segments_say_of_each_row_what_a_loop_says(lengths: list[int], seed: int):
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    mask, counts = torch.rand(tokens, generator=draw) < 0.5, torch.randint(3, (tokens, 2), generator=draw)
    segments = Segments.between(torch.tensor([0, *lengths]).cumsum(0), tokens)
    start = 0
    for row, length in enumerate(lengths):
        own = slice(start, start + length)
        true = mask[own].nonzero().flatten().tolist()
        assert segments.spans[row] == (start, start + length)
        assert int(segments.last_true(mask)[row]) == start + (true[-1] if true else 0)
        assert bool(segments.any(mask)[row]) == bool(true)
        assert torch.equal(segments.sums(counts)[row], counts[own].sum(0))
        assert torch.equal(segments.running(counts)[own], counts[own].cumsum(0))
        assert torch.equal(segments.spread(torch.arange(len(lengths)))[own], torch.full((length,), row))
        start += length
    kept, borders = segments.prefixes(segments.last_true(mask))
    ends = segments.last_true(mask).tolist()
    assert kept.tolist() == [
        place for (first, _), last in zip(segments.spans, ends, strict=True) for place in range(first, last + 1)
    ]
    assert borders.tolist()[-1] == len(kept)


@pytest.mark.parametrize("share", ["nothing", "down", "up"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_rows_through_their_own_experts_agree_with_the_loop(share: str, dropped: bool, k: int):
    draw = torch.Generator().manual_seed(3)
    lengths, experts, rank, inputs, outputs = [3, 1, 4], 3, 2, 5, 6
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, A, B = (
        new(1, 8, inputs),
        new(1 if share == "down" else experts, rank, inputs),
        new(1 if share == "up" else experts, outputs, rank),
    )
    weights, base = new(3, k), nn.Linear(inputs, outputs, dtype=torch.float64).requires_grad_(False)
    ids = torch.stack([torch.randperm(experts, generator=draw)[:k] for _ in lengths])
    segments = Segments.between(torch.tensor([0, *lengths]).cumsum(0), 8)
    routing = Routing(ids, weights, None, "sequence", torch.ones(3, dtype=torch.bool), segments=segments)
    keep = torch.rand(x.shape) < 0.5 if dropped else None
    seen = x if keep is None else x.masked_fill(~keep, 0.0)
    layer = Layer(A, B, weights_by_token(routing, A), 1.7, base)
    ways = [
        fused([layer], x[0], None if keep is None else keep[0], ByRows.of(routing))[0][None],
        by_segment(base(x), seen, A, B, routing, 1.7),
        loop(base(x), seen, A, B, routing, 1.7),
    ]
    slope = torch.randn(1, 8, outputs, generator=draw, dtype=torch.float64)
    found = [[way, *torch.autograd.grad((way * slope).sum(), [x, A, B, weights], retain_graph=True)] for way in ways]
    for one in found[:2]:
        for got, wanted in zip(one, found[2], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_layers_that_read_the_same_rows_agree_with_each_alone(dropped: bool, k: int):
    draw = torch.Generator().manual_seed(4)
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, weights = new(1, 8, 5), new(3, k)
    experts = [new(3, 2, 5), new(3, 6, 2), new(1, 4, 5), new(3, 7, 4)]  # the second layer's A is shared
    bases = [nn.Linear(5, out, dtype=torch.float64).requires_grad_(False) for out in (6, 7)]
    segments = Segments.between(torch.tensor([0, 3, 4, 8]), 8)
    ids = torch.stack([torch.randperm(3, generator=draw)[:k] for _ in range(3)])
    routing = Routing(ids, weights, None, "sequence", torch.ones(3, dtype=torch.bool), segments=segments)
    keep = torch.rand(x.shape) < 0.5 if dropped else None
    seen = x if keep is None else x.masked_fill(~keep, 0.0)
    gates = weights_by_token(routing, x)
    layers = [Layer(A, B, gates, 1.7, base) for A, B, base in zip(experts[::2], experts[1::2], bases, strict=True)]
    together = fused(layers, x[0], None if keep is None else keep[0], ByRows.of(routing))
    alone = [
        loop(base(x), seen, A, B, routing, 1.7)[0]
        for A, B, base in zip(experts[::2], experts[1::2], bases, strict=True)
    ]
    slopes = [torch.randn(8, out, generator=draw, dtype=torch.float64) for out in (6, 7)]
    found = [
        torch.autograd.grad(
            sum((y * s).sum() for y, s in zip(ys, slopes, strict=True)), [x, weights, *experts], retain_graph=True
        )
        for ys in (together, alone)
    ]
    for got, wanted in zip([*together, *found[0]], [*alone, *found[1]], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_an_accelerator_does_not_go_through_rows_one_by_one(monkeypatch: pytest.MonkeyPatch):
    segments = Segments.between(torch.tensor([0, 3, 8]), 8)
    ids, weights = torch.tensor([[1], [0]]), torch.rand(2, 1, requires_grad=True)
    routing = Routing(ids, weights, None, "sequence", torch.ones(2, dtype=torch.bool), segments=segments)
    narrow, wide = ((torch.empty(e, 8, 16), torch.empty(e, 16, 8)) for e in (8, 64))
    assert choose("auto", routing, *narrow) == choose("auto", routing, *wide) == "per_sequence"
    # Shapes alone stand for the device that would train.
    assert choose("auto", routing, *(one.to("meta") for one in narrow)) == "per_sequence"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert choose("auto", routing, *(one.to("meta") for one in narrow)) == "concat"
    assert choose("auto", routing, *(one.to("meta") for one in wide)) == "grouped"
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((1, 8, 16), (1, 8, 16), (2, 8, 16), (2, 16, 8))]
    found = []
    for way in (loop, grouped, concat):
        out = way(*tensors, routing, 1.7)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*tensors, weights])])
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("window", [None, 4])
def test_a_sliding_window_slides_within_its_row(window: int | None):
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()
    batch = PaddingFreeCollator()(examples())
    told = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")}
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([e.encoded.input_ids])).logits[0] for e in examples()])
        with segment_attention(model):
            assert model.config._attn_implementation == NAME
            got = model(**told, max_length_q=12, max_length_k=12, use_cache=False).logits[0]
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_bases_are_tried_before_they_are_trusted():
    assert keeps_segments_apart(tiny.llama(layers=1))
    assert keeps_segments_apart(tiny.moa(tiny.llama(layers=1)))
    assert keeps_segments_apart(Qwen3ForCausalLM(Qwen3Config(**SMALL)))
    small = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    assert keeps_segments_apart(GPT2LMHeadModel(small)), "learned positions are told"

    class Forgetful(GPT2LMHeadModel):
        """Reads no positions: its rows run into each other."""

        def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    assert not keeps_segments_apart(Forgetful(small))


def test_a_base_in_training_mode_is_left_in_it():
    model = tiny.moa(tiny.llama(layers=1)).train()
    modes = {name: module.training for name, module in model.named_modules()}
    keeps_segments_apart(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_trying_the_base_thaws_nothing():
    model = tiny.moa()
    frozen = {name for name, parameter in model.named_parameters() if "router" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.requires_grad)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert keeps_segments_apart(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
