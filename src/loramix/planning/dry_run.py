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

from loramix.losses import head_nll
from loramix.models.last_states import last_states
from loramix.planning.alive import Alive
from loramix.planning.flops import counting
from loramix.planning.shapes_attention import ShapesAttention, attending
from loramix.planning.shapes_autocast import ShapesAutocast
from loramix.routing import Call
from loramix.segments import BORDERS
from loramix.training.reading_ahead import reads_base
from loramix.tuner.guide import ForwardGuide


@dataclass(frozen=True)
class LongRow:
    """What a step learns at once, and how.

    Attributes:
        tokens: of the long row.
        learned: how many of them are learned.
        mean: length of the rows it consists of; attention goes no further.
        head_chunk: rows of the head at a time; 0 for all.
        apart: whether it tells where its rows end, as batches without padding do. On a processor attention and experts
            then go row by row.
        bf16: whether the forward runs in autocast.
    """

    tokens: int
    learned: int
    mean: int
    head_chunk: int
    apart: bool = False
    bf16: bool = False

    @property
    def rows(self) -> int:
        """How many rows it tells apart."""
        return max(1, round(self.tokens / self.mean)) if self.apart and self.mean else 1


@dataclass(frozen=True)
class DryRun:
    """One forward and backward of one row. Weights, and gradients that were there before, are left out of the bytes.

    Attributes:
        tokens: of the row.
        parameters, trained: numbers of the whole model, and those with gradients.
        flops: of forward and backward; what is computed again in the backward counts again.
        kept_bytes: what is alive between forward and backward.
        peak_bytes: the most that is alive at any time, forward, backward and gradients; what kernels hold for
            themselves is not seen.
        weight_bytes: of all parameters in the base's type.
    """

    tokens: int
    parameters: int
    trained: int
    flops: int
    kept_bytes: int
    peak_bytes: int
    weight_bytes: int

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward."""
        return self.flops / self.tokens


def dry_run(model: Any, row: LongRow, ahead: bool = False, later: bool = False) -> DryRun:
    """Returns what a step of one long row costs. A model whose activation checkpointing is on runs with it.

    Args:
        model: a base on the meta device, or a PeftModel on one.
        row: that is learned.
        ahead: whether what routers take in of prompts is known beforehand, so that the step does not read them.
        later: whether an earlier part of the step has left gradients, to which those of this one are added.

    Raises:
        ConfigError: the base needs more than shapes to run.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    attention = ShapesAttention(
        row.mean / row.tokens, rows=row.rows, by_row=row.apart and not torch.accelerator.is_available()
    )
    guide = ForwardGuide.on(base)
    given = _given(guide, row)
    ids_1N = torch.zeros(1, row.tokens, dtype=torch.int64, device="meta")
    with _gradients(trained, later) as gradients:
        alive = Alive([*parameters, *model.buffers(), *gradients])
        products = _Grouped()  # type: ignore[no-untyped-call]
        # Last, so that it sees operations whole: the counter takes some apart that a true step does in one.
        with attending(base, attention), torch.device("meta"), ShapesAutocast(), products, counting() as counter, alive:
            with last_states(model) as states, torch.autocast("cpu", torch.bfloat16, enabled=row.bf16):
                if guide is not None and reads_base(model) and not ahead:
                    _read_prompts(guide, row)
                none = torch.zeros(0, dtype=torch.int64)
                model(input_ids=ids_1N, logits_to_keep=none, use_cache=False, **given)
            head = base.get_output_embeddings()
            targets_N = torch.zeros(row.learned, dtype=torch.int64)
            nll_N = head_nll(
                states[-1][0, : row.learned], head.weight, head.bias, targets_N, row.head_chunk or row.learned
            )
            kept = alive.bytes
            torch.autograd.backward([nll_N.sum(), *_asked_of_routers(guide)])
    return DryRun(
        tokens=row.tokens,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        flops=counter.get_total_flops() + round(attention.flops),
        kept_bytes=kept,
        peak_bytes=alive.peak,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _given(guide: ForwardGuide | None, row: LongRow) -> dict[str, Any]:
    """Returns what the forward is told beside the row. What routers take in of prompts is among it, since telling the
    prompts of rows apart takes numbers; that they are read is `_read_prompts`'."""
    given: dict[str, Any] = {}
    if row.apart:
        borders_B1 = torch.zeros(row.rows + 1, dtype=torch.int32, device="meta")
        given |= dict(zip(BORDERS, (borders_B1, borders_B1, row.mean, row.mean), strict=True))
    mixture = None if guide is None else guide.active()
    if mixture is not None:
        given["domain_ids"] = torch.zeros(row.rows, dtype=torch.int64)
        given["prompt_mask"] = torch.ones(1, _prompt(row), dtype=torch.bool, device="meta")
        if mixture.settled_by == "prompt" and mixture.reads_base:
            given["prompt_states"] = {
                scope: torch.empty(row.rows, door.in_features, device="meta") for scope, door in mixture.doors.items()
            }
    return given


def _prompt(row: LongRow) -> int:
    return max(1, row.tokens - row.learned)


def _read_prompts(guide: ForwardGuide, row: LongRow) -> None:
    """Lets the base alone read as many tokens as prompts have, as a step does first whose routers want to know."""
    ids_1P = torch.zeros(1, _prompt(row), dtype=torch.int64)
    mask_1P = torch.ones_like(ids_1P, dtype=torch.bool)
    guide.read_prompts(ids_1P, {}, Call(mask_1P, mask_1P), "last")


def _asked_of_routers(guide: ForwardGuide | None) -> list[Tensor]:
    """Returns what routing losses go back from; where a label teaches routers, the language loss does not reach
    them, and what they keep would be held to the end."""
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


class _Grouped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Grouped products in any type; torch 2.13 knows their shapes in bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, ends_E = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
        groups = (len(ends_E),) if right.dim() == 2 else ()  # sums over rows: one matrix a group
        return left.new_empty(*groups, left.shape[0], right.shape[-1])
