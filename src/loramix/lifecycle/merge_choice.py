"""What a user wants merged, and all that can be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loramix.adapters.mixture import whole_experts_problem
from loramix.errors import ConfigError, Problems, did_you_mean
from loramix.lifecycle.peft_merging import COMBINATIONS
from loramix.methods import method_named
from loramix.tuner import LoramixConfig

LEARNED: Literal["learned"] = "learned"
Weights = Mapping[str, float] | Literal["learned"]


@dataclass(frozen=True, kw_only=True)
class MergeChoice:
    """What is to be merged, and how.

    Attributes:
        expert: fold this one into the base.
        weights: or make one LoRA of a fixed weighted sum: by expert, or "learned" (LoRAHub's own).
        rank: the nearest LoRA of this rank instead of the exact one.
        combination: or a way of PEFT's, see peft_merging.COMBINATIONS.
        density: of that way: share of values kept.
        seed: of DARE's pruning; 0 by default.
        into_base: fold the weighted sum into the base too.
    """

    expert: str | None = None
    weights: Weights | None = None
    rank: int | None = None
    combination: str | None = None
    density: float | None = None
    seed: int | None = None
    into_base: bool = False


def parsed_weights(words: Sequence[str]) -> Weights | None:
    """Returns the weights of ["a=0.5", "b=0.5"], or "learned"; None where there are no words.

    Raises:
        ConfigError: with all words that are none of these.
    """
    if not words:
        return None
    if list(words) == [LEARNED]:
        return LEARNED
    problems = Problems("--weights")
    found: dict[str, float] = {}
    for word in words:
        name, sign, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            sign = ""
        if not sign or not name:
            problems.add(f"{word!r}: expected NAME=NUMBER, or the one word {LEARNED!r}.")
        elif name in found:
            problems.add(f"{name}: given twice. Give each expert one weight.")
        else:
            found[name] = value
    problems.raise_as(ConfigError)
    return found


def check_choice(choice: MergeChoice, config: LoramixConfig, folder: Path | None) -> Path:
    """Checks a choice against a run's adapter; returns the folder to write.

    Raises:
        ConfigError: with all that is wrong.
    """
    problems = Problems("the merge")
    names = list(config.experts or [])
    if choice.expert is None and choice.weights is None:
        problems.add(_choices(config))
    elif choice.expert is not None and choice.weights is not None:
        problems.add("--expert and --weights contradict each other: one expert, or a sum of several. Give one of them.")
    if choice.expert is not None and choice.expert not in names:
        problems.add(_unknown("--expert", choice.expert, names))
    if problem := whole_experts_problem(config):
        problems.add(problem)
    if choice.weights is not None:
        _check_weights(choice, config, problems)
    else:
        given = {"--rank": choice.rank, "--combination": choice.combination, "--density": choice.density}
        for option in [name for name, value in given.items() if value is not None]:
            problems.add(f"{option}: is for --weights; one expert goes into the base as it is. Leave it out.")
    _check_way(choice, problems)
    if folder is None:
        problems.add("--output-dir: is missing. Name a new folder for the result.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.add(f"{folder}: is not empty. Name a new folder.")
    problems.raise_as(ConfigError)
    assert folder is not None
    return folder


def _choices(config: LoramixConfig) -> str:
    names = list(config.experts or [])
    each = " ".join(f"{name}={1 / len(names):.3g}" for name in names)
    routes = method_named(config.method).router is not None
    why = (
        f"nothing was chosen, and the routing of method {config.method} depends on the input: no single weight matrix "
        "is equal to it. Choose what is:"
        if routes and config.method != "lorahub"
        else "nothing was chosen. Choose:"
    )
    lines = [
        why,
        f"  --expert NAME              one expert in the base's weights ({', '.join(names)})",
        f"  --weights {each}    one LoRA, the exact weighted sum, of rank {int(config.r or 0) * len(names)}",
        "  --weights ... --rank R     the nearest LoRA of rank R; its error is measured",
        f"  --weights ... --combination KIND [--density D]    PEFT's merging: {', '.join(COMBINATIONS)}",
        "  --weights ... --into-base  any of these in the base's weights",
    ]
    if config.method == "lorahub":
        lines.insert(
            1, "  --weights learned          the mixture itself: its weights are constant, so one LoRA equals it"
        )
    return "\n  ".join(lines)


def _unknown(option: str, name: str, names: Sequence[str]) -> str:
    return f"{option} {name!r}: no such expert. Expected one of {', '.join(names)}.{did_you_mean(name, names)}"


def _check_weights(choice: MergeChoice, config: LoramixConfig, problems: Problems) -> None:
    names = list(config.experts or [])
    if choice.weights == LEARNED:
        if config.method != "lorahub":
            problems.add(
                f"--weights learned: method {config.method} has no constant weights; its routing depends on the input. "
                "Give NAME=NUMBER for each expert."
            )
        if choice.combination is not None:
            problems.add("--combination: contradicts --weights learned, which says how its experts are summed.")
        return
    assert isinstance(choice.weights, Mapping)
    for name, weight in choice.weights.items():
        if name not in names:
            problems.add(_unknown("--weights", name, names))
        if not math.isfinite(weight) or weight < 0:
            problems.add(f"--weights {name}={weight:g}: expected a number of 0 or more.")
    used = [name for name, weight in choice.weights.items() if weight]
    if not used:
        problems.add("--weights: all are 0, which is the bare base. Give one expert a weight above 0.")
    if choice.combination is not None and len(used) == 1:
        problems.add(f"--combination {choice.combination}: needs two experts with a weight above 0, got one.")


def _check_way(choice: MergeChoice, problems: Problems) -> None:
    """Adds what is wrong with rank, combination, density and seed among themselves."""
    kind = choice.combination
    if choice.rank is not None and choice.rank < 1:
        problems.add(f"--rank {choice.rank}: expected 1 or more.")
    if kind is not None and kind not in COMBINATIONS:
        exact = " The exact sum and its nearest of a rank need no --combination." if kind in ("cat", "svd") else ""
        problems.add(
            f"--combination {kind}: expected one of {', '.join(COMBINATIONS)}.{did_you_mean(kind, COMBINATIONS)}{exact}"
        )
        return
    if choice.rank is not None and kind is not None and not kind.endswith("_svd"):
        problems.add(f"--rank: {kind} keeps the experts' rank. Leave --rank out, or use {kind}_svd if there is one.")
    needs = kind not in (None, "linear")
    if needs and choice.density is None:
        problems.add(
            f"--combination {kind}: needs --density, the share of values kept. Common: 0.2 (ties), 0.5 (dare)."
        )
    if choice.density is not None and not needs:
        problems.add(f"--density: nothing is pruned by {kind or 'the weighted sum'}. Leave it out.")
    elif choice.density is not None and not 0 < choice.density <= 1:
        problems.add(f"--density {choice.density:g}: expected a share above 0, up to 1.")
    if choice.seed is not None and not (kind or "").startswith("dare"):
        problems.add("--seed: only dare kinds draw numbers. Leave it out.")
