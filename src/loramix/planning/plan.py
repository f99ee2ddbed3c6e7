"""What each stage of an experiment will take: parameters, FLOPs, memory, time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import get_peft_model

from loramix.adapter_settings import adapter_config, together_config
from loramix.budget import all_stages, expert_settings, joint_settings, longer, rows_learned
from loramix.corpus import Encoded
from loramix.data.collation import Example
from loramix.methods import method_named
from loramix.models import load_skeleton
from loramix.planning.dry_run import DryRun
from loramix.planning.dry_step import DryStep, long_row
from loramix.planning.few_layers import without_taught_routers
from loramix.planning.kept_random import kept_random
from loramix.planning.seconds import Amount, Stopwatch
from loramix.planning.work import Work
from loramix.settings import Experiment
from loramix.training.reading_ahead import reads_base
from loramix.training.settings import TrainingSettings
from loramix.training.smaller_batches import bound_of

GRADIENT_BYTES, ADAM_BYTES = 4, 8
"""A gradient, and Adam's two moments, of each trained number, fp32."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    Attributes:
        stage: its name; one for all experts that are trained one after another. Controls, which a run trains to
            compare with, are called so.
        parameters, trained: numbers of the model.
        tokens: real tokens learned from, all epochs.
        flops_per_token: forward and backward.
        memory_bytes: the peak, by what holds it: weights, training (Adam; gradients where a step has several parts),
            activations (of the longest part of a micro-batch, with the head's chunk; or gradients, if they are more).
        seconds: on this machine when it has nothing else to do, with the threads that torch uses now; from steps
            measured on a few layers.
        note: what is to be known of `seconds`: why no steps could be measured, or what they leave out.
    """

    stage: str
    parameters: int
    trained: int
    tokens: int
    flops_per_token: int
    memory_bytes: dict[str, int]
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class _Training:
    """What is trained in a stage, and how; `taught` says whether the routers that are there learn;
    `losses` are auxiliary ones with their weights."""

    stage: str
    config: Any
    settings: TrainingSettings
    tokens: int
    taught: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)


def plan(experiment: Experiment, data: Encoded) -> list[StagePlan]:
    """Returns the plan of each stage and control that takes gradient steps with experts, in a run's order. No weights
    are loaded.

    Args:
        experiment: the settings.
        data: its examples.

    Raises:
        ConfigError: the base does not run on shapes alone, or its layers cannot run again in the backward.
    """
    everything = [one for part in data.train.values() for one in part]
    watch = Stopwatch(experiment, everything)
    with kept_random():
        return [_planned(experiment, training, everything, watch) for training in _trainings(experiment, data)]


def _trainings(experiment: Experiment, data: Encoded) -> Iterator[_Training]:
    """Yields what `pipeline.run_experiment` trains."""
    method, domains = method_named(experiment.method), list(data.train)
    on_all = partial(_tokens, data.train, data.shares(experiment.data))
    last = method.stages[-1]
    if method.expert_count == "one":
        settings = expert_settings(experiment)
        yield _Training(last.name, adapter_config(experiment, domains), settings, on_all(settings))
        return
    if method.starts_from_experts:
        yield _experts(experiment, data)
        if "single_long" in experiment.controls:
            yield _experts_trained_on(experiment, data)
    if "mixed" in experiment.controls:
        settings, config = all_stages(experiment, data), adapter_config(experiment, domains, "lora")
        yield _Training("control mixed: one LoRA on all domains", config, settings, on_all(settings))
    if method.tuner == "loramix" and last.takes_steps:
        settings = joint_settings(experiment)
        losses, config = {**method.losses, **settings.losses}, adapter_config(experiment, domains)
        yield _Training(last.name, config, settings, on_all(settings), taught=True, losses=losses)


def _experts(experiment: Experiment, data: Encoded) -> _Training:
    settings, domains = expert_settings(experiment), list(data.train)
    tokens = sum(_tokens({name: part}, {name: 1.0}, settings) for name, part in data.train.items())
    if not experiment.experts_together or len(domains) == 1:
        config = adapter_config(experiment, domains, "lora", domains[0])
        return _Training(f"{len(domains)} experts, one after another", config, settings, tokens)
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * len(domains)
    settings = replace(settings, per_device_train_batch_size=batch, gradient_accumulation_steps=1)
    return _Training(f"{len(domains)} experts, together", together_config(experiment, domains), settings, tokens)


def _experts_trained_on(experiment: Experiment, data: Encoded) -> _Training:
    """The domains have steps of different sizes; the largest says what memory they take."""
    domains = list(data.train)
    settings = {name: longer(experiment, data, name) for name in domains}
    tokens = sum(_tokens({name: data.train[name]}, {name: 1.0}, settings[name]) for name in domains)
    largest = max(settings.values(), key=lambda one: one.per_device_train_batch_size)
    config = adapter_config(experiment, domains, "lora", domains[0])
    return _Training(f"control single_long: {len(domains)} experts, each trained on alone", config, largest, tokens)


def _tokens(parts: Mapping[str, Sequence[Example]], shares: Mapping[str, float], settings: TrainingSettings) -> int:
    """Returns the real tokens that a stage learns from: its rows, of the mean length that the mixture has."""
    mean = sum(shares[name] * sum(one.length for one in part) / len(part) for name, part in parts.items())
    return round(rows_learned(settings, sum(len(part) for part in parts.values())) * mean)


def _planned(experiment: Experiment, training: _Training, examples: Sequence[Example], watch: Stopwatch) -> StagePlan:
    settings, tokens = training.settings, training.tokens
    lengths = [one.length for one in examples]
    learned = sum(one.supervised_tokens for one in examples) / sum(lengths)
    longest = largest_part(settings, max(lengths))
    several = longest < settings.per_device_train_batch_size * settings.gradient_accumulation_steps * max(lengths)
    skeleton = load_skeleton(experiment.model_name_or_path).to(getattr(torch, experiment.dtype))
    config = copy.deepcopy(training.config)  # PEFT writes the modules it finds into it
    model = without_taught_routers(get_peft_model(skeleton, config).train(), training.taught)
    row = round(sum(lengths) / len(lengths))
    dry = DryStep(settings, long_row(settings, longest, learned, row), later=several)
    seen, once = dry(model), 0.0
    ahead = reads_base(model) and settings.read_ahead and tokens > sum(lengths)
    if ahead:  # prompts are read once, not in every epoch
        dry, every_time = replace(dry, ahead=True), seen
        seen = dry(model)
        once = (every_time.flops_per_token - seen.flops_per_token) * sum(lengths)
    flops = seen.flops_per_token * tokens + once
    per_step = row * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    work = Work(training.config, settings, training.losses, training.taught, ahead)
    amount = Amount(tokens, tokens * learned, tokens / per_step, once)
    seconds, note = watch.seconds(work, amount, seen, dry)
    return StagePlan(
        stage=training.stage,
        parameters=seen.parameters,
        trained=seen.trained,
        tokens=tokens,
        flops_per_token=round(flops / tokens),
        memory_bytes=memory(seen, model, settings, longest, learned, several),
        seconds=seconds,
        note=note,
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
    words = model.get_base_model().config.get_text_config().vocab_size
    rows = max(1, round(tokens * learned))
    head = 2 * 4 * words * min(rows, settings.head_chunk or rows)  # logits, and what their sum holds for itself
    training = (ADAM_BYTES + (GRADIENT_BYTES if several else 0)) * seen.trained
    at_most = max(seen.kept_bytes + head, seen.peak_bytes)
    return {"weights": seen.weight_bytes, "training": training, "activations": at_most}
