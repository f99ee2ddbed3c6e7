"""What each stage of an experiment will take: parameters, FLOPs, memory, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import get_peft_model

from loramix.adapter_settings import adapter_config, together_config
from loramix.budget import rows_learned
from loramix.data.collation import Example
from loramix.methods import method_named
from loramix.models import load_skeleton
from loramix.planning.dry_run import DryRun, dry_run
from loramix.settings import Experiment
from loramix.training.settings import TrainingSettings
from loramix.training.smaller_batches import bound_of
from loramix.training.while_learning import while_learning

EFFICIENCY = 0.71
"""Share of the GEMM rate that steps reached on the built-in base; benchmarks/plan_error.py says how far off it is."""
GRADIENT_BYTES, ADAM_BYTES = 4, 8
"""A gradient, and Adam's two moments, of each trained number, fp32."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    Attributes:
        stage: its name; one for all experts that are trained one after another.
        parameters, trained: numbers of the model.
        tokens: real tokens learned from, all epochs.
        flops_per_token: forward and backward.
        memory_bytes: the peak, by what holds it: weights, training (Adam; gradients where a step has several parts),
            activations (of the longest part of a micro-batch, and the head's chunk).
        seconds: FLOPs over the measured GEMM rate times EFFICIENCY, on this machine.
    """

    stage: str
    parameters: int
    trained: int
    tokens: int
    flops_per_token: int
    memory_bytes: dict[str, int]
    seconds: float


def plan(experiment: Experiment, train: dict[str, list[Example]]) -> list[StagePlan]:
    """Returns the plan of each stage that takes gradient steps. No weights are loaded.

    Args:
        experiment: the settings.
        train: examples by domain.

    Raises:
        ConfigError: the base does not run on shapes alone.
    """
    method, everything = method_named(experiment.method), [one for part in train.values() for one in part]
    stages = []
    rate = gemm_rate(experiment)
    if method.tuner != "loramix":
        return []
    domains = list(train)
    if method.starts_from_experts:
        settings = experiment.settings(experiment.expert_stage)
        rows = sum(rows_learned(settings, len(part)) for part in train.values())
        if experiment.experts_together and len(domains) > 1:
            batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * len(domains)
            settings = replace(settings, per_device_train_batch_size=batch, gradient_accumulation_steps=1)
            config, name = together_config(experiment, domains), f"{len(domains)} experts, together"
        else:
            config = adapter_config(experiment, domains, "lora", domains[0])
            name = f"{len(domains)} experts, one after another"
        stages.append(_stage(experiment, config, name, settings, rows, everything, rate, taught=False))
    if method.stages[-1].takes_steps:
        settings = experiment.settings(experiment.joint_stage)
        rows = rows_learned(settings, len(everything))
        config, name = adapter_config(experiment, domains), method.stages[-1].name
        stages.append(_stage(experiment, config, name, settings, rows, everything, rate, taught=True))
    return stages


def _stage(
    experiment: Experiment,
    config: Any,
    name: str,
    settings: TrainingSettings,
    rows: int,
    examples: Sequence[Example],
    rate: float,
    taught: bool,
) -> StagePlan:
    """Plans a stage; `taught` says whether the routers that are there learn."""
    lengths = [one.length for one in examples]
    mean = sum(lengths) / len(lengths)
    tokens = round(rows * mean)
    learned = sum(one.supervised_tokens for one in examples) / sum(lengths)
    longest = largest_part(settings, max(lengths))
    of_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * max(lengths)
    skeleton = load_skeleton(experiment.model_name_or_path).to(getattr(torch, experiment.dtype))
    model = get_peft_model(skeleton, config).train()
    for parameter_name, parameter in model.named_parameters():
        if not taught and ".loramix_router." in parameter_name:
            parameter.requires_grad_(False)
    router = method_named(config.method).router
    told = router is not None and router.settled_by != "nothing"
    by_row = settings.padding_free and not torch.accelerator.is_available()
    run = partial(dry_run, model, longest, max(1, round(longest * learned)), round(mean), settings.head_chunk, told)
    with while_learning(model, settings, apart=False):  # what is kept; attention is the dry run's own
        seen = run(by_row)
        flops = seen.flops / longest * tokens
        if told and settings.read_ahead and rows > len(examples):  # prompts are read once, not in every epoch
            every_time, seen = seen, run(by_row, ahead=True)
            flops = (seen.flops * tokens + (every_time.flops - seen.flops) * sum(lengths)) / longest
    return StagePlan(
        stage=name,
        parameters=seen.parameters,
        trained=seen.trained,
        tokens=tokens,
        flops_per_token=round(flops / tokens),
        memory_bytes=memory(seen, model, settings, longest, learned, longest < of_step),
        seconds=flops / (rate * EFFICIENCY),
    )


def largest_part(settings: TrainingSettings, longest: int) -> int:
    """Returns the tokens of the largest part of a micro-batch that is learned at once, as long rows as there are."""
    whole = settings.per_device_train_batch_size * longest
    bound = bound_of(settings.tokens_at_once)
    return whole if bound == 0 else max(longest, min(bound, whole))


def memory(
    seen: DryRun, model: Any, settings: TrainingSettings, tokens: int, learned: float, several: bool
) -> dict[str, int]:
    """Returns bytes at the peak of a step, by what holds them. A gradient appears in the backward, when what was kept
    for it goes; those of an earlier part of the step are there already.

    Args:
        seen: of `tokens` tokens.
        model: on the meta device.
        settings: of the stage.
        tokens: of the largest part.
        learned: the share of tokens that is learned.
        several: whether a step has several parts.
    """
    base = model.get_base_model()
    words = base.config.get_text_config().vocab_size
    rows = max(1, round(tokens * learned))
    head = 2 * 4 * words * min(rows, settings.head_chunk or rows)  # logits and what becomes of them
    kept = seen.kept_bytes
    if settings.activation_checkpointing:
        layers = base.config.get_text_config().num_hidden_layers
        kept = kept // layers + layers * tokens * base.config.get_text_config().hidden_size * 4
    gradients = GRADIENT_BYTES * seen.trained
    at_most = kept + head if several else max(kept + head, gradients)
    training = ADAM_BYTES * seen.trained + (gradients if several else 0)
    return {"weights": seen.weight_bytes, "training": training, "activations": at_most}


def gemm_rate(experiment: Experiment) -> float:
    """Returns FLOP/s of a product of the base's size, measured now on the device that would train, within a second."""
    config: Any = load_skeleton(experiment.model_name_or_path).config.get_text_config()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = getattr(torch, experiment.dtype)
    x = torch.randn(1024, config.hidden_size, dtype=dtype, device=device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
    best, begun = 0.0, time.monotonic()
    while time.monotonic() - begun < 0.5:
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # waits for the device
        best = max(best, 2 * x.numel() * len(weight) / (time.perf_counter() - start))
    return best
