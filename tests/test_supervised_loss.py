"""The head in parts gives the loss and the gradients of whole logits, and holds no tensor of all rows by all words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from loramix.data.collation import Collator, Example
from loramix.data.prompts import Encoded
from loramix.losses import head_nll
from loramix.models.last_states import plain_head
from loramix.training.smaller_batches import in_parts
from loramix.training.supervised_loss import SupervisedLoss
from tests import method_cases as cases
from tests import tiny

VOCAB, WIDTH = 64, 32


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_and_the_gradient_are_those_of_whole_logits(chunk: int, bias: bool):
    states, weight = torch.randn(7, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    bias_V = torch.randn(VOCAB) if bias else None
    targets, weights = torch.randint(VOCAB, (7,)), torch.rand(7)
    plain = F.cross_entropy(F.linear(states, weight, bias_V), targets, reduction="none")
    wanted = torch.autograd.grad((plain * weights).sum(), states)[0]
    ours = head_nll(states, weight, bias_V, targets, chunk)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), states)[0], wanted)
    with torch.no_grad():
        torch.testing.assert_close(head_nll(states, weight, bias_V, targets, chunk), plain)


def test_extreme_logits_stay_finite():
    states = (torch.randn(4, WIDTH) * 1e4).requires_grad_()
    loss = head_nll(states, torch.randn(VOCAB, WIDTH), None, torch.tensor([0, 1, 2, 3]), 2)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(states.grad).all()


def _batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    examples = []
    for row, (length, prompt) in enumerate([(9, 4), (5, 2), (12, 9)]):
        ids = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        examples.append(Example(Encoded(ids, [n >= prompt for n in range(length)], prompt), row))
    return Collator(0)(examples)


def _told(batch: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name in {"input_ids", "attention_mask", *names}}


@pytest.mark.parametrize("method", ["lora", "moa", "mosld", "mola", "mixlora"])
def test_a_models_rows_and_gradients_are_those_of_its_logits(method: str):
    model: Any = (tiny.moa() if method == "moa" else cases.build(method, tiny.llama(layers=2))).train(False)
    batch = _batch()
    asked = _told(batch, {"domain_ids", "prompt_mask"})
    found = []
    for chunk in (0, 4):
        model.zero_grad()
        loss = SupervisedLoss(model, chunk)
        nll_B, tokens_B = loss(model, asked, batch)
        assert (loss._head is None) == (chunk == 0), "the fast way was not taken, so nothing is shown"
        (nll_B / (1 + tokens_B)).sum().backward()
        found.append((nll_B.detach(), tokens_B, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][2].keys() == found[1][2].keys()
    for name, wanted in found[0][2].items():
        if wanted is not None:
            torch.testing.assert_close(
                found[1][2][name], wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "mola"])
def test_under_autocast_too_no_logits_are_asked_for(method: str, dtype: torch.dtype):
    """As the trainer does it: autocast around the model's forward, the loss outside."""
    model: Any = cases.build(method, tiny.llama(layers=2)).train(False)
    if dtype == torch.bfloat16:
        tiny.in_halves(model)
    true = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(true)
    batch = _batch()
    asked = _told(batch, {"domain_ids", "prompt_mask"})
    found = []
    for chunk in (0, 4):
        model.zero_grad()
        loss = SupervisedLoss(model, chunk)
        nll_B, _ = loss(model, asked, batch)
        assert (loss._head is None) == (chunk == 0), "the fast way was not taken, so nothing is shown"
        nll_B.sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        found.append((nll_B.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-2, atol=2e-2)
    for name, wanted in found[0][1].items():
        assert found[1][1][name].dtype == torch.float32
        near = 5e-2 * wanted.abs().max().item() + 1e-6
        torch.testing.assert_close(found[1][1][name], wanted, rtol=0, atol=near, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_does_more_to_its_logits_is_asked_for_them():
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    assert plain_head(model) is not None, "it looks like any other"
    batch = _batch()
    found = [SupervisedLoss(model, chunk)(model, _told(batch, set()), batch)[0] for chunk in (0, 4)]
    assert torch.equal(*found)


def test_a_head_that_is_trained_is_asked_for_logits():
    assert plain_head(tiny.llama(layers=1)) is not None
    assert plain_head(tiny.llama(layers=1).requires_grad_(True)) is None


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return found


def test_no_tensor_holds_all_rows_by_all_words():
    rows, words = 512, 4096
    states, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(words, 8)
    with _Largest() as largest:
        head_nll(states, weight, None, torch.zeros(rows, dtype=torch.int64), 64).sum().backward()
    assert largest.numbers <= 64 * words


def test_parts_of_a_batch_know_their_own_supervised_tokens():
    batch = _batch()
    model: Any = cases.build("lora", tiny.llama(layers=2)).train(False)
    whole = SupervisedLoss(model, 4)(model, _told(batch, {"domain_ids", "prompt_mask"}), batch)[0]
    parts = [
        SupervisedLoss(model, 4)(model, _told(part, {"domain_ids", "prompt_mask"}), part)[0]
        for part in in_parts(batch, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
