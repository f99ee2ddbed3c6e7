"""How long each stage and each control trains: as many examples and as many updates as what it is compared with."""

from __future__ import annotations

import math
from dataclasses import replace

from loramix import processes
from loramix.corpus import Encoded
from loramix.methods import method_named
from loramix.settings import Experiment
from loramix.training.settings import TrainingSettings


def expert_settings(experiment: Experiment) -> TrainingSettings:
    """Returns the settings of stage 1, each expert alone."""
    return experiment.settings(experiment.expert_stage)


def joint_settings(experiment: Experiment) -> TrainingSettings:
    """Returns the settings of the stage on all domains."""
    return experiment.settings(experiment.joint_stage)


def steps(settings: TrainingSettings, examples: int) -> int:
    """Returns the optimizer steps that Trainer takes for that many examples."""
    if settings.max_steps > 0:
        return settings.max_steps
    return math.ceil(settings.num_train_epochs * steps_per_epoch(settings, examples))


def rows_per_step(settings: TrainingSettings) -> int:
    """Returns the examples of one optimizer step, over all processes."""
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes.count()


def rows_learned(settings: TrainingSettings, examples: int) -> int:
    """Returns how many examples a stage sees, counted as often as they are seen; the last batch of an epoch may be
    short."""
    taken, each = steps(settings, examples), steps_per_epoch(settings, examples)
    return taken // each * examples + min(examples, taken % each * rows_per_step(settings))


def steps_per_epoch(settings: TrainingSettings, examples: int) -> int:
    """Returns the optimizer steps in which every example is seen once."""
    of_each = math.ceil(math.ceil(examples / settings.per_device_train_batch_size) / processes.count())
    return math.ceil(of_each / settings.gradient_accumulation_steps)


def steps_for(rows: int, settings: TrainingSettings, examples: int) -> int:
    """Returns the steps in which at least so many examples are seen."""
    whole, rest = divmod(rows, examples)
    return max(1, whole * steps_per_epoch(settings, examples) + math.ceil(rest / rows_per_step(settings)))


def joint_steps(experiment: Experiment, data: Encoded) -> int:
    """Returns the optimizer steps of the stage on all domains; 0 where the method has none by gradients."""
    last = method_named(experiment.method).stages[-1]
    if not last.takes_steps:
        return 0
    return steps(joint_settings(experiment), sum(len(examples) for examples in data.train.values()))


def all_stages(experiment: Experiment, data: Encoded) -> TrainingSettings:
    """Returns settings under which one LoRA sees all domains for as many steps as all of the method's stages."""
    total = joint_steps(experiment, data)
    if not method_named(experiment.method).starts_from_experts:
        return replace(joint_settings(experiment), max_steps=total)
    first = expert_settings(experiment)
    total += sum(steps(first, len(examples)) for examples in data.train.values())
    return replace(first, max_steps=total)


def longer(experiment: Experiment, data: Encoded, domain: str) -> TrainingSettings:
    """Returns settings under which one expert goes on alone just as stage 2 would train it.

    The same number of optimizer steps, and in each of them the domain's share of stage 2's rows: the same examples seen
    and the same number of updates. With whole batches it would get as many examples but a fraction of the updates, and
    a gain of the mixture could be no more than that.
    """
    share = data.shares(experiment.data)[domain]
    return longer_settings(joint_settings(experiment), joint_steps(experiment, data), share)


def longer_settings(second: TrainingSettings, steps_of_second: int, share: float) -> TrainingSettings:
    """Returns the settings of `longer` from those of stage 2, its steps, and the domain's share of its rows."""
    return replace(
        second,
        max_steps=steps_of_second,
        per_device_train_batch_size=max(1, round(rows_per_step(second) * share / processes.count())),
        gradient_accumulation_steps=1,
    )
