"""One row of a comparison: a label, its method, in which settings it is run, and the experiment it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loramix.errors import ConfigError, Problems, did_you_mean
from loramix.experiment import build, settle, typed
from loramix.methods import METHODS
from loramix.settings import Experiment

Setting = Literal["single", "mixture"]
BASE = "base"
"""The row of the bare base."""
LONGER = "lora-long"
"""The row of each domain's LoRA trained on for as long as a mixture's second stage."""
_ROW_KEYS = ("method", "settings")
_COMMON_ONLY = ("seed", "model_name_or_path", "controls", "output_dir", "dtype")
ALONE = "experts_together: a comparison trains each expert by itself, to share it between rows. Leave it out."


@dataclass(frozen=True)
class Row:
    """One line of the table: a label, its method and the experiment it stands for (of the first base and seed).

    `stages` are the training settings of stage 1 and of stage 2, from which lengths are counted; a method with one
    stage trains by the first.
    """

    label: str
    method: str
    settings: tuple[Literal["single", "mixture", "none"], ...]
    experiment: Experiment
    stages: tuple[dict[str, Any], dict[str, Any]]

    @property
    def ids(self) -> list[str]:
        """Names of the row in its settings: "moa/mixture", "base"."""
        return [self.label if setting == "none" else f"{self.label}/{setting}" for setting in self.settings]


def starts_from_experts(method: str) -> bool:
    """Whether a row's method trains experts first."""
    return method in METHODS and METHODS[method].starts_from_experts


def row_of(
    label: str, given: Mapping[str, Any], common: Mapping[str, Any], settings: list[Setting], output_dir: str
) -> tuple[Row | None, list[str]]:
    """Returns the row, and what is wrong with it.

    Args:
        label: its name in tables.
        given: what the file says of it.
        common: settings of every row.
        settings: in which rows are run that do not say.
        output_dir: of the comparison.
    """
    problems = Problems(label)
    own = settle({key: value for key, value in given.items() if key not in _ROW_KEYS}, (), problems, [])
    method = str(given.get("method", label))
    if method not in (BASE, LONGER) and method not in METHODS:
        known = [BASE, LONGER, *METHODS]
        return None, [f"method = {method!r}: no such method.{did_you_mean(method, known)} Known: {', '.join(known)}."]
    run_in, wrong = _settings(method, given.get("settings"), settings)
    wrong += [f"{key}: is the same for all rows. Set it for the comparison." for key in _COMMON_ONLY if key in own]
    if "experts_together" in own:
        wrong.append(ALONE)
    two_stages = starts_from_experts(method)
    if not two_stages and own.get("expert_stage"):
        wrong.append(f"expert_stage: {method} trains no expert alone. Set training.")
    if method == "lora" and own.get("joint_stage"):
        wrong.append("joint_stage: lora has one stage. Set training.")
    mapping = merged(common, own)
    mapping.update(method="lora" if method in (BASE, LONGER) else method, output_dir=output_dir)
    if method == BASE or METHODS[mapping["method"]].tuner != "loramix":
        mapping["adapter"] = own.get("adapter", {})
    first, second = _stages(common, own, two_stages=two_stages or method == LONGER)
    mapping |= {"training": {} if two_stages else first, "expert_stage": {}, "joint_stage": {}}
    if two_stages:
        mapping |= {"expert_stage": first, "joint_stage": second}
    try:
        experiment = build(mapping, where=label).experiment
    except ConfigError as error:
        return None, wrong + [line.strip() for line in str(error).splitlines()[1:]]
    return Row(label, method, run_in, experiment, (first, second)), wrong


def _stages(
    common: Mapping[str, Any], own: Mapping[str, Any], *, two_stages: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the training settings of both stages, a row's own over the common ones. The only stage of a method
    trains by the common stage 1, under the row's own `training` and `joint_stage`."""
    first = {**common.get("training", {}), **common.get("expert_stage", {}), **own.get("training", {})}
    first |= own.get("expert_stage", {}) if two_stages else own.get("joint_stage", {})
    second = {**common.get("training", {}), **common.get("joint_stage", {}), **own.get("training", {})}
    return typed(first), typed({**second, **own.get("joint_stage", {})})


def _settings(
    method: str, asked: Any, common: list[Setting]
) -> tuple[tuple[Literal["single", "mixture", "none"], ...], list[str]]:
    """Returns the settings a row is run in: by default the comparison's, as far as the method can."""
    if method == BASE:
        return ("none",), []
    can: tuple[Setting, ...] = ("single", "mixture")
    if method == LONGER:
        can = ("single",)
    elif METHODS[method].expert_count == "one per domain" or METHODS[method].settled_by == "domain":
        can = ("mixture",)
    if asked is None:
        return can if method in ("lora", LONGER) else tuple(s for s in common if s in can) or can, []
    wanted = tuple(asked) if isinstance(asked, list) else (asked,)
    wrong = [f"settings: {method} can be run as {' and '.join(can)}, not as {s!r}." for s in wanted if s not in can]
    return tuple(s for s in wanted if s in can), wrong


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a new nested mapping, the second over the first."""
    made = dict(below)
    for key, value in above.items():
        under = made.get(key)
        made[key] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return made
