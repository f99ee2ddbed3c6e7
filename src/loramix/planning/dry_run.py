"""A training step without numbers: the model on the meta device, where tensors have shapes and nothing else.

What is counted is therefore what the real step does, method by method: its parameters, the FLOPs of its products, the
tensors its forward keeps for the backward. A base of any size takes seconds and hardly any memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from loramix.errors import ConfigError
from loramix.losses import head_nll
from loramix.models.last_states import last_states
from loramix.planning.flops import counting
from loramix.tuner.guide import ForwardGuide

ATTENTION = "loramix_dry_run"
BY_ROW = "loramix_dry_run_by_row"


@dataclass(frozen=True)
class DryRun:
    """One forward and backward of one row.

    Attributes:
        parameters, trained: numbers of the whole model, and those with gradients.
        flops: of forward and backward.
        kept_bytes: what the forward keeps for the backward, weights left out.
        weight_bytes: of all parameters in the base's type.
    """

    parameters: int
    trained: int
    flops: int
    kept_bytes: int
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
) -> DryRun:
    """Returns what a step of one long row costs.

    Args:
        model: a base on the meta device, or a PeftModel on one.
        tokens: of the long row.
        learned: how many of them are learned.
        row: mean length of the rows it consists of; attention goes no further.
        head_chunk: rows of the head at a time; 0 for all.
        told: whether the forward is told a domain and a prompt.
        ahead: whether what routers take in of prompts is known beforehand, so that the step does not read them.
        by_row: whether attention goes row by row, as on a processor, and what it gives is copied into one tensor.

    Raises:
        ConfigError: the base needs more than shapes to run.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    before = base.config._attn_implementation
    AttentionInterface.register(ATTENTION, _attention)
    AttentionInterface.register(BY_ROW, _by_row)
    base.config._attn_implementation = BY_ROW if by_row else ATTENTION
    ids_1N = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    given: dict[str, Any] = {}
    if told:
        width = max(1, tokens - learned)
        given = {"domain_ids": torch.zeros(1, dtype=torch.int64)}
        given["prompt_mask"] = torch.ones(1, width, dtype=torch.bool, device="meta")
        if ahead:
            given["prompt_states"] = {
                scope: torch.empty(1, door.in_features, device="meta") for scope, door in _doors(base).items()
            }
    kept = _Kept(model)
    attention = _Attended(base.config.get_text_config(), row)
    products = _Grouped()  # type: ignore[no-untyped-call]
    try:
        with torch.device("meta"), products, counting() as counter, saved_tensors_hooks(kept, _same):
            with last_states(model) as states:
                none = torch.zeros(0, dtype=torch.int64)
                model(input_ids=ids_1N, logits_to_keep=none, use_cache=False, **given)
            head = base.get_output_embeddings()
            states_NH = states[-1][0, :learned]
            targets_N = torch.zeros(learned, dtype=torch.int64)
            nll_N = head_nll(states_NH, head.weight, head.bias, targets_N, head_chunk or learned)
            nll_N.sum().backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the plan: this base does not run on shapes alone ({str(error).splitlines()[0][:120]}). Train with "
            "max_steps=2 and look at the log instead."
        ) from error
    finally:
        base.config._attn_implementation = before
    forwards = len(states) + (1 if told and not ahead and _reads(model) else 0)
    parameters = list(model.parameters())
    return DryRun(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        flops=counter.get_total_flops() + attention.flops(tokens, forwards),
        kept_bytes=kept.bytes,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _doors(base: Any) -> dict[str, Any]:
    """Returns the modules that routers sit at, by scope."""
    mixture = ForwardGuide.of(base).active()
    return {} if mixture is None else mixture.doors


def _reads(model: Any) -> bool:
    """Whether the base reads the prompts once more."""
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    return bool((getattr(config, "router", None) or {}).get("reads") == "base")


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Grouped(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Grouped products in any type; torch 2.13 knows their shapes in bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        left, right, ends_E = args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]
        groups = (len(ends_E),) if right.dim() == 2 else ()  # sums over rows: one matrix a group
        return left.new_empty(*groups, left.shape[0], right.shape[-1])


class _Kept:
    """Adds up what is saved for the backward, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {
            parameter.untyped_storage()._cdata: parameter.untyped_storage() for parameter in model.parameters()
        }
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # held, so that no other gets its place
            self.bytes += storage.nbytes()
        return tensor


class _Attended:
    """FLOPs of attention within rows: two products of T x T by head, half of it causal; two and a half times that
    backward, where the scores are made again."""

    def __init__(self, config: Any, row: int) -> None:
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.of_token = 4 * width * row // 2 * config.num_hidden_layers

    def flops(self, tokens: int, forwards: int) -> int:
        return int(self.of_token * tokens * (forwards + 2.5))


class _Shapes(torch.autograd.Function):
    """An attention of which only the shapes are true: keeps what a flash kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: nn.Module, query_BHTD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    out_BHTD: Tensor = _Shapes.apply(query_BHTD, key, value)  # type: ignore[no-untyped-call]
    return out_BHTD.transpose(1, 2).contiguous(), None


def _by_row(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attention(*args, **kwargs)[0].clone(), None
