"""Experts of a run merged into one thing that routes nothing: a plain PEFT LoRA, or a plain model.

A routing that depends on its input has no weight matrix that equals it, so nothing is merged unless the user says what:
one expert, or a fixed weighted sum. What is not exact is measured.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loramix.adapters.adapter import Adapter, replace_folder, write_adapter
from loramix.adapters.alike import short_targets
from loramix.adapters.lora import Lora, lora_adapter
from loramix.adapters.mixture import check_mixture, take_lora
from loramix.environment import environment
from loramix.errors import ConfigError
from loramix.lifecycle.editing import mixture_of
from loramix.lifecycle.importing import sizes_of
from loramix.lifecycle.merge_choice import LEARNED, MergeChoice, check_choice
from loramix.lifecycle.merge_into_base import TEXTS, agreement, fold_in, logits_on
from loramix.lifecycle.peft_merging import Combination, combined
from loramix.lifecycle.weighted_sum import Deviation, concatenated, deviation, stored, summed_matrices, truncated
from loramix.methods import method_named
from loramix.models import load_base, load_tokenizer
from loramix.opening import load_adapter, open_run
from loramix.prompt_store import read_prompts
from loramix.run_folder import RunFolder, write_json
from loramix.settings import Experiment
from loramix.tuner import LoramixConfig

REPORT = "merge_report.json"
MOST_PROMPTS = 8


@dataclass(frozen=True)
class Merged:
    """One LoRA made of experts.

    Attributes:
        lora: as it is stored.
        weights: of each expert that is in it.
        way: "expert", "weighted sum", "learned weights", "nearest of rank R", or PEFT's name.
        exact: whether it equals what was asked for, up to rounding.
        deviation: from that, measured.
    """

    lora: Lora
    weights: dict[str, float]
    way: str
    exact: bool
    deviation: Deviation


def merge_experts(path: Path, folder: Path | None, choice: MergeChoice) -> dict[str, Any]:
    """Merges experts of a run as chosen, writes the result with its report, and returns the report.

    Args:
        path: of the run.
        folder: where to; new or empty.
        choice: what is merged, and how.

    Raises:
        ConfigError: nothing was chosen, or what was cannot be; with all problems.
        ModelError: the adapter is damaged, or the base cannot take it.
    """
    run, experiment = open_run(path)
    adapter = mixture_of(run, experiment)
    config = check_mixture(adapter)
    folder = check_choice(choice, config, folder)
    merged = _merged(adapter, config, experiment, choice)
    report: dict[str, Any] = {
        "what": "plain PEFT LoRA",
        "run": str(run.path),
        "base": experiment.model_name_or_path,
        "method": config.method,
        "way": merged.way,
        "weights": merged.weights,
        "rank": merged.lora.rank,
        "density": choice.density,
        "seed": (choice.seed or 0) if (choice.combination or "").startswith("dare") else None,
        "exact_up_to_rounding": merged.exact,
        "relative_error": merged.deviation.as_dict(),
    }
    if choice.expert is not None or choice.into_base:
        report |= {"what": "plain transformers model", "dtype": experiment.dtype}
        _write_model(run, experiment, config, merged, folder, report)
        return report
    report["environment"] = environment()
    linears = list(sizes_of(experiment.model_name_or_path))
    lora = lora_adapter(merged.lora, short_targets(list(merged.lora.modules), linears))
    write_adapter(lora, folder, {REPORT: json.dumps(report, indent=2, ensure_ascii=False) + "\n"})
    return report


def _merged(adapter: Adapter, config: LoramixConfig, experiment: Experiment, choice: MergeChoice) -> Merged:
    names = list(config.experts or [])
    if choice.expert is not None:
        lora = take_lora(adapter, config, choice.expert)
        return Merged(lora, {choice.expert: 1.0}, "expert", True, deviation(lora, lora))
    experts = {name: take_lora(adapter, config, name) for name in names}
    if choice.weights == LEARNED:
        found = [tensor for key, tensor in adapter.tensors.items() if key.endswith(".loramix_router.weights_E")]
        if len(found) != 1:
            raise ConfigError(
                f"--weights learned: the run has weights for each {config.scope}, {len(found)} sets. Expected one for "
                "the whole model (scope: model). Give NAME=NUMBER for each expert."
            )
        weights_E = found[0]
        weights = dict(zip(names, weights_E.tolist(), strict=True))
        exact, way = summed_matrices(experts, weights), "learned weights"
    else:
        assert isinstance(choice.weights, Mapping)
        weights = {name: choice.weights[name] for name in names if choice.weights.get(name)}
        exact, way = concatenated(experts, weights), "weighted sum"
    if choice.combination is not None:
        how = Combination(choice.combination, choice.density, choice.rank, choice.seed or 0)
        base = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
        lora = combined(base, experts, weights, how)
        return Merged(lora, weights, choice.combination, False, deviation(lora, exact))
    if choice.rank is None:
        return Merged(stored(exact), weights, way, True, deviation(stored(exact), exact))
    if choice.rank >= exact.rank:
        raise ConfigError(
            f"--rank {choice.rank}: the {way} is exact at rank {exact.rank}. Leave --rank out, or give a smaller one."
        )
    lora = stored(truncated(exact, choice.rank))
    return Merged(lora, weights, f"nearest of rank {choice.rank} to the {way}", False, deviation(lora, exact))


def _write_model(
    run: RunFolder, experiment: Experiment, config: LoramixConfig, merged: Merged, folder: Path, report: dict[str, Any]
) -> None:
    """Folds a LoRA into the base, writes the model, reads it again and adds to the report how it answers."""
    name, dtype = experiment.model_name_or_path, experiment.dtype
    tokenizer = load_tokenizer(name)
    prompts = _prompts(run, tokenizer, merged.weights)
    beside, wanted = _beside_the_base(run, experiment, config, merged, prompts)
    base = load_base(name, dtype=dtype)
    rounding, to_weights = fold_in(base, merged.lora)
    folder = folder.resolve()  # "." has no name to put something beside
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    base.save_pretrained(str(making))
    tokenizer.save_pretrained(str(making))
    found = logits_on(load_base(str(making), dtype=dtype), prompts)
    report["rounding"] = {**rounding.as_dict(), "relative_to_the_weights": to_weights}
    report["answers"] = {"beside": beside, "prompts": len(prompts), **asdict(agreement(wanted, found))}
    report["environment"] = environment()
    write_json(making / REPORT, report)
    replace_folder(making, folder)


def _beside_the_base(
    run: RunFolder, experiment: Experiment, config: LoramixConfig, merged: Merged, prompts: list[list[int]]
) -> tuple[str, list[torch.Tensor]]:
    """Returns what the merged model is held against, and its logits: the run's own model pinned to the expert where it
    can be, else the LoRA by stock PEFT beside the base."""
    base = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
    if merged.way == "expert" and method_named(config.method).settled_by == "prompt":
        expert = next(iter(merged.weights))
        told = torch.tensor([list(config.experts or []).index(expert)])
        return f"the run's model pinned to {expert}", logits_on(load_adapter(base, run.model), prompts, domain_ids=told)
    with tempfile.TemporaryDirectory() as temporary:
        write_adapter(lora_adapter(merged.lora), Path(temporary) / "lora")
        model = PeftModel.from_pretrained(base, str(Path(temporary) / "lora")).eval()
        return "the same LoRA beside the base, by PEFT", logits_on(model, prompts)


def _prompts(run: RunFolder, tokenizer: Any, weights: Mapping[str, float]) -> list[list[int]]:
    """Returns a few prompts: stored ones of the merged experts' domains, else texts of ours."""
    stored_prompts = read_prompts(run.prompts)
    each = max(1, MOST_PROMPTS // len(weights))
    found = [ids for name in weights for ids in stored_prompts.get(name, [])[:each]][:MOST_PROMPTS]
    return found or [list(tokenizer(text)["input_ids"]) for text in TEXTS]
