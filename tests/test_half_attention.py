"""Attention in 16 bits whose backward is in fp32: the forward is torch's, gradients no further from the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loramix.data.padding_free import PaddingFreeCollator
from loramix.models import half_attention as module
from loramix.models import segment_attention as segment_attention_module
from loramix.models.half_attention import attends_in_halves, half_attention
from loramix.models.segment_attention import segment_attention
from tests import method_cases as cases
from tests import tiny
from tests.test_padding_free import examples, learned


def drawn(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(tokens)
    sizes = (4, 2, 2)  # two queries share a key
    return [torch.randn(1, h, tokens, 16, generator=made).to(dtype).requires_grad_() for h in sizes]


def outcome(way, given: list[Tensor]) -> list[Tensor]:
    out = way(*given)
    slope = torch.arange(out.numel()).view_as(out).float().cos().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, slope)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [None, 0.4])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_the_forward_is_torchs_and_gradients_are_nearer(tokens: int, scaling: float | None, dtype: torch.dtype):
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)

    given = drawn(tokens, dtype)
    own = outcome(lambda q, k, v: half_attention(q, k, v, scaling), given)
    torchs = outcome(plain, given)
    truth = outcome(plain, [one.detach().double().requires_grad_() for one in given])
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(own[0], torchs[0], rtol=unit, atol=unit)
    for mine, theirs, true in zip(own[1:], torchs[1:], truth[1:], strict=True):
        assert mine.dtype == dtype
        apart, most = ((one.double() - true).abs().max().item() for one in (mine, theirs))
        rest = 1e-3 if tokens == 1 else 0.0  # the gradients of a single token's query and key are 0
        assert apart <= 1.1 * most + unit * true.abs().max().item() + rest


def test_it_is_for_learning_in_halves_on_a_processor():
    assert attends_in_halves(*drawn(3, torch.bfloat16))
    assert not attends_in_halves(*drawn(3, torch.float32))
    assert not attends_in_halves(*(one.to("meta") for one in drawn(3, torch.bfloat16)))
    with torch.no_grad():
        assert not attends_in_halves(*drawn(3, torch.bfloat16))


def test_what_torchs_operation_does_not_take_is_left_to_attention():
    """Values of another size than keys (DeepSeek, MiniCPM3), numbers with gaps between them, no causality."""
    q, _, _ = drawn(3, torch.bfloat16)
    k, v = q.flip(1), q.flip(2)
    assert attends_in_halves(q, k, v)
    assert not attends_in_halves(q, k, v[..., :8].contiguous())
    assert not attends_in_halves(q.repeat_interleave(2, -1)[..., ::2], k, v)
    assert not attends_in_halves(q, k, v.transpose(-1, -2).contiguous().transpose(-1, -2))
    border = torch.tensor([0, 3])
    for asked in ({"is_causal": False}, {"dropout": 0.5}):
        torch.manual_seed(0)
        out, _ = segment_attention_module._attention(nn.Module(), q, k, v, None, cu_seq_lens_q=border, **asked)
        torch.manual_seed(0)
        wanted, _ = sdpa_attention_forward(nn.Module(), q, k, v, None, **asked)
        torch.testing.assert_close(out, wanted)


def test_rows_without_padding_take_it(monkeypatch: pytest.MonkeyPatch):
    """And give what torch's own backward gives, as near as bf16 comes."""
    asked: list[int] = []
    true = module.half_attention
    found = []
    for halves in (True, False):
        with monkeypatch.context() as patched:
            place = "loramix.models.segment_attention"
            patched.setattr(f"{place}.half_attention", lambda *given: asked.append(1) or true(*given))
            if not halves:
                patched.setattr(f"{place}.attends_in_halves", lambda *_: False)
            model = cases.build("lora", tiny.llama(layers=2))
            tiny.in_halves(model)
            with segment_attention(model):
                found.append(learned(model, PaddingFreeCollator()(examples()), {}))
        assert len(asked) == 4 * 2, "four rows, two layers"
    (ours, said), (torchs, said_torchs) = found
    torch.testing.assert_close(said["loss"], said_torchs["loss"])
    for name, wanted in torchs.items():
        near = 5e-2 * wanted.abs().max().item() + 1e-6
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=near, msg=lambda m, n=name: f"{n}: {m}")
