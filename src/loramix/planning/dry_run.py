"""A training step without numbers: the model on the meta device, where tensors have shapes and nothing else.

What is counted is therefore what the real step does, method by method: its parameters, the FLOPs of its products, the
tensors that are alive, and with activation checkpointing the layers that run again. A base of any size takes seconds
and hardly any memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from loramix.errors import ConfigError
from loramix.losses import head_nll
from loramix.models.last_states import last_states
from loramix.planning.alive import Alive
from loramix.planning.flops import counting
from loramix.tuner.guide import ForwardGuide

ATTENTION = "loramix_dry_run"


@dataclass(frozen=True)
class DryRun:
    """One forward and backward of one row. Weights, and gradients that were there before, are left out of the bytes.

    Attributes:
        parameters, trained: numbers of the whole model, and those with gradients.
        flops: of forward and backward; what is computed again in the backward counts again.
        kept_bytes: what is alive between forward and backward.
        peak_bytes: the most that is alive at any time, forward, backward and gradients; what kernels hold for
            themselves is not seen.
        weight_bytes: of all parameters in the base's type.
    """

    parameters: int
    trained: int
    flops: int
    kept_bytes: int
    peak_bytes: int
    weight_bytes: int


def dry_run(
    model: Any,
    tokens: int,
    learned: int,
    row: int,
    head_chunk: int,
    told: bool,
    by_row: bool = False,
    ahead: bool = False,
    later: bool = False,
) -> DryRun:
    """Returns what a step of one long row costs. A model whose activation checkpointing is on runs with it.

    Args:
        model: a base on the meta device, or a PeftModel on one.
        tokens: of the long row.
        learned: how many of them are learned.
        row: mean length of the rows it consists of; attention goes no further.
        head_chunk: rows of the head at a time; 0 for all.
        told: whether the forward is told a domain and a prompt.
        by_row: whether attention goes row by row, as on a processor, and what it gives is copied into one tensor.
        ahead: whether what routers take in of prompts is known beforehand, so that the step does not read them.
        later: whether an earlier part of the step has left gradients, to which those of this one are added.

    Raises:
        ConfigError: the base needs more than shapes to run.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    attention, given = _Attention(row / tokens, by_row), _given(base, tokens, learned, told, ahead)
    ids_1N = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with _gradients(trained, later) as gradients:
        alive = Alive([*parameters, *model.buffers(), *gradients])
        products = _Grouped()  # type: ignore[no-untyped-call]
        # Last, so that it sees operations whole: the counter takes some apart that a true step does in one.
        with _attending(base, attention), torch.device("meta"), products, counting() as counter, alive:
            with last_states(model) as states:
                none = torch.zeros(0, dtype=torch.int64)
                model(input_ids=ids_1N, logits_to_keep=none, use_cache=False, **given)
            head = base.get_output_embeddings()
            targets_N = torch.zeros(learned, dtype=torch.int64)
            nll_N = head_nll(states[-1][0, :learned], head.weight, head.bias, targets_N, head_chunk or learned)
            kept = alive.bytes
            torch.autograd.backward([nll_N.sum(), *_asked_of_routers(base)])
    return DryRun(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        flops=counter.get_total_flops() + round(attention.flops),
        kept_bytes=kept,
        peak_bytes=alive.peak,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _given(base: Any, tokens: int, learned: int, told: bool, ahead: bool) -> dict[str, Any]:
    """Returns what the forward is told beside the row."""
    if not told:
        return {}
    width = max(1, tokens - learned)
    given: dict[str, Any] = {"domain_ids": torch.zeros(1, dtype=torch.int64)}
    given["prompt_mask"] = torch.ones(1, width, dtype=torch.bool, device="meta")
    if ahead:
        given["prompt_states"] = {
            scope: torch.empty(1, door.in_features, device="meta") for scope, door in _doors(base).items()
        }
    return given


def _asked_of_routers(base: Any) -> list[Tensor]:
    """Returns what routing losses go back from; where a label teaches routers, the language loss does not reach
    them, and what they keep would be held to the end."""
    guide = ForwardGuide.on(base)
    call = None if guide is None else guide.context.call
    logits = [] if call is None else [routing.logits for routing in call.routings.values()]
    return [one.sum() for one in logits if one is not None and one.requires_grad]


@contextmanager
def _gradients(trained: list[nn.Parameter], there: bool) -> Iterator[list[Tensor]]:
    """Gives parameters gradients, if they are to be there, and takes all away in the end."""
    gradients: list[Tensor] = [torch.empty_like(parameter) for parameter in trained] if there else []
    for parameter, gradient in zip(trained, gradients, strict=False):
        parameter.grad = gradient
    try:
        yield gradients
    finally:
        for parameter in trained:
            parameter.grad = None


@contextmanager
def _attending(base: Any, attention: _Attention) -> Iterator[None]:
    """Lets a base attend by `attention`, and says it in a line where it does not run on shapes alone."""
    before = base.config._attn_implementation
    AttentionInterface.register(ATTENTION, attention)
    base.config._attn_implementation = ATTENTION
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the plan: this base does not run on shapes alone ({str(error).splitlines()[0][:120]}). Train with "
            "max_steps=2 and look at the log instead."
        ) from error
    finally:
        base.config._attn_implementation = before


def _doors(base: Any) -> dict[str, Any]:
    """Returns the modules that routers sit at, by scope."""
    mixture = ForwardGuide.of(base).active()
    return {} if mixture is None else mixture.doors


class _Grouped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Grouped products in any type; torch 2.13 knows their shapes in bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, ends_E = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
        groups = (len(ends_E),) if right.dim() == 2 else ()  # sums over rows: one matrix a group
        return left.new_empty(*groups, left.shape[0], right.shape[-1])


class _Attention:
    """Stands in for a base's attention: true shapes, and the tensors that a flash kernel keeps.

    Args:
        share: of a row in the long row.
        by_row: whether what it gives is copied.

    Attributes:
        flops: of attention within rows so far: two products of T x T by head, half of it causal; two and a half times
            that backward, where the scores are made again.
    """

    def __init__(self, share: float, by_row: bool) -> None:
        self.share, self.by_row, self.flops = share, by_row, 0.0

    def __call__(
        self, module: nn.Module, query_BHTD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        out_BHTD: Tensor = _Shapes.apply(query_BHTD, key, value, self)  # type: ignore[no-untyped-call]
        out_BTHD = out_BHTD.transpose(1, 2).contiguous()
        return (out_BTHD.clone() if self.by_row else out_BTHD), None

    def count(self, query_BHTD: Tensor, times: float) -> None:
        """Adds the FLOPs of one layer."""
        self.flops += times * 2 * query_BHTD.numel() * query_BHTD.shape[2] * self.share


class _Shapes(torch.autograd.Function):
    """An attention of which only the shapes are true: keeps what a flash kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention: _Attention) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        ctx.attention = attention
        attention.count(query, 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, _ = ctx.saved_tensors
        ctx.attention.count(query, 2.5)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
