"""An experiment from its settings to its results: read, train the stages and the controls, measure, write.

Order: stage 1 (each expert alone; also the single-LoRA baseline), the control that trains each of them on, the mixed
control, then the method. Each trained model is measured as soon as it exists, so a run is one pass over one base.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import set_seed

from loramix.errors import DataError
from loramix.evaluation.evaluate import RoutedResult, Row, measure_routed, rows_of, score_domains
from loramix.evaluation.scoring import Score
from loramix.experiment import adapter_config
from loramix.methods import method_named
from loramix.opening import ADAPTER, check_trained, load_adapter
from loramix.preparation import Prepared, prepare
from loramix.run_folder import RunFolder, write_json
from loramix.settings import Experiment
from loramix.training.settings import TrainingSettings
from loramix.training.stages import train_stage
from loramix.tuner.assembly import Expert, put_experts, take_expert


@dataclass
class Results:
    """What is written to results.json."""

    rows: list[Row] = field(default_factory=list)
    routed: RoutedResult | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self, domains: Sequence[str], method: str) -> dict[str, Any]:
        """Returns the content of results.json; see docs/results-format.md."""
        content: dict[str, Any] = {
            "method": method,
            "domains": list(domains),
            "rows": [asdict(row) for row in self.rows],
        }
        if self.routed is not None:
            routers = self.routed.routers
            content["router_accuracy"] = routers.by_domain
            content["router_accuracy_overall"] = routers.overall
            content["router_accuracy_by_layer"] = routers.by_layer
            content["router_confusion"] = routers.confusion
            content["router_prompts"] = routers.prompts
            content["perplexity_by_decision"] = {
                decision: {row.domain: row.perplexity for row in rows}
                for decision, rows in self.routed.by_decision.items()
            }
        content["examples"] = self.examples
        content["stages"] = self.stages
        content["seconds"] = round(self.seconds, 1)
        return content


def run_experiment(experiment: Experiment, console: Console) -> dict[str, Any]:
    """Trains and measures everything the experiment asks for and returns the content of results.json.

    Args:
        experiment: the settings.
        console: where progress is shown.
    """
    started = time.monotonic()
    prepared = prepare(experiment, console)
    results = Results()
    if "base" in experiment.controls:
        console.print("measuring the base ...", highlight=False)
        results.rows += rows_of("base", score_domains(prepared.base, prepared.held, pad_token_id=prepared.pad))
    method = method_named(experiment.method)
    if method.expert_count == "one":
        _train_one(prepared, results, "mixed", prepared.run.model, _expert_settings(prepared))
    else:
        experts = _train_experts(prepared, results)
        if "mixed" in experiment.controls:
            _train_one(prepared, results, "mixed", prepared.run.mixed, _both_stages(prepared))
        _train_method(prepared, results, experts)
    results.seconds = time.monotonic() - started
    content = results.as_dict(prepared.domains, experiment.method)
    write_json(prepared.run.results, content)
    return content


def _expert_settings(prepared: Prepared) -> TrainingSettings:
    return prepared.experiment.settings(prepared.experiment.expert_stage)


def _joint_settings(prepared: Prepared) -> TrainingSettings:
    return prepared.experiment.settings(prepared.experiment.joint_stage)


def _steps(settings: TrainingSettings, examples: int) -> int:
    """Returns the optimizer steps that Trainer takes for that many examples."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = math.ceil(examples / settings.per_device_train_batch_size)
    return math.ceil(settings.num_train_epochs * math.ceil(batches / settings.gradient_accumulation_steps))


def _joint_steps(prepared: Prepared) -> int:
    return _steps(_joint_settings(prepared), sum(len(examples) for examples in prepared.train.values()))


def _both_stages(prepared: Prepared) -> TrainingSettings:
    """Returns settings under which one LoRA sees all domains for as many steps as stage 1 and stage 2 together."""
    first = _expert_settings(prepared)
    alone = sum(_steps(first, len(examples)) for examples in prepared.train.values())
    return replace(first, max_steps=alone + _joint_steps(prepared))


def _longer(prepared: Prepared, domain: str) -> TrainingSettings:
    """Returns settings under which one expert goes on alone just as stage 2 would train it.

    The same number of optimizer steps, and in each of them the domain's share of stage 2's rows: the same examples seen
    and the same number of updates. With whole batches it would get as many examples but a fraction of the updates, and
    a gain of the mixture could be no more than that.
    """
    second = _joint_settings(prepared)
    rows = second.per_device_train_batch_size * second.gradient_accumulation_steps
    share = max(1, round(rows * prepared.shares()[domain]))
    return replace(
        second,
        max_steps=_joint_steps(prepared),
        per_device_train_batch_size=share,
        gradient_accumulation_steps=1,
    )


def _stage(
    prepared: Prepared, model: Any, title: str, domains: Sequence[str], settings: TrainingSettings
) -> dict[str, Any]:
    shares = prepared.shares() if len(domains) > 1 else dict.fromkeys(domains, 1.0)
    return train_stage(
        model,
        {domain: prepared.train[domain] for domain in domains},
        domains=prepared.domains,
        title=title,
        settings=settings,
        shares=shares,
        pad_token_id=prepared.pad,
        output_dir=prepared.run.path,
        log_file=prepared.run.log,
        console=prepared.console,
        auxiliary=method_named(model.peft_config[ADAPTER].method).losses,
    )


def _with_adapter(prepared: Prepared, experts: Sequence[str], method: str) -> PeftModel:
    set_seed(prepared.experiment.seed)
    return get_peft_model(prepared.base, adapter_config(prepared.experiment, experts, method), adapter_name=ADAPTER)


def _train_experts(prepared: Prepared, results: Results) -> dict[str, Expert]:
    """Stage 1: each expert alone, measured on its own domain; and the same trained on, if asked for."""
    experts: dict[str, Expert] = {}
    for domain in prepared.domains:
        model = _with_adapter(prepared, [domain], "lora")
        results.stages[f"expert {domain}"] = _stage(
            prepared, model, f"expert {domain}", [domain], _expert_settings(prepared)
        )
        _save(model, prepared.run.expert(domain))
        experts[domain] = take_expert(model.get_base_model(), ADAPTER)
        results.rows += rows_of("single", _own_domain(prepared, model, domain))
        if "single_long" in prepared.experiment.controls:
            title = f"longer {domain}"
            results.stages[title] = _stage(prepared, model, title, [domain], _longer(prepared, domain))
            _save(model, prepared.run.longer(domain))
            results.rows += rows_of("single_long", _own_domain(prepared, model, domain))
        prepared.base = model.unload()
    return experts


def _own_domain(prepared: Prepared, model: Any, domain: str) -> dict[str, list[Score]]:
    return score_domains(model, {domain: prepared.held[domain]}, pad_token_id=prepared.pad)


def _train_one(prepared: Prepared, results: Results, name: str, folder: Path, settings: TrainingSettings) -> None:
    """One LoRA on all domains."""
    model = _with_adapter(prepared, ["mixed"], "lora")
    results.stages[name] = _stage(prepared, model, name, prepared.domains, settings)
    _save(model, folder)
    results.rows += rows_of(name, score_domains(model, prepared.held, pad_token_id=prepared.pad))
    prepared.base = model.unload()


def _train_method(prepared: Prepared, results: Results, experts: dict[str, Expert]) -> None:
    """Stage 2: the experts side by side, with routers; measured under every decision; one answer for each domain."""
    name = prepared.experiment.method
    model, results.stages["joint"] = train_joint(prepared, experts)
    _save(model, prepared.run.model)
    prepared.console.print(f"measuring {name} ...", highlight=False)
    measure(prepared, model, results)
    write_json(prepared.run.results, results.as_dict(prepared.domains, name))
    results.examples = answers(prepared, model)


def train_joint(prepared: Prepared, experts: dict[str, Expert]) -> tuple[PeftModel, dict[str, Any]]:
    """Returns the experiment's method trained from its experts, and what the stage saw."""
    name = prepared.experiment.method
    model = _with_adapter(prepared, prepared.domains, name)
    put_experts(model.get_base_model(), ADAPTER, experts)
    seen = _stage(prepared, model, f"{name}: experts and routers", prepared.domains, _joint_settings(prepared))
    return model, seen


def measure(prepared: Prepared, model: Any, results: Results) -> None:
    """Measures a routed model and adds rows for the oracle and for its own decision."""
    name = prepared.experiment.method
    routed = measure_routed(model, prepared.held, pad_token_id=prepared.pad, name=name)
    decision = model.peft_config[ADAPTER].decision
    if decision not in routed.by_decision and decision != "pinned":
        routed.by_decision[decision] = rows_of(
            decision, score_domains(model, prepared.held, pad_token_id=prepared.pad, decision=decision)
        )
    named = [("oracle", "oracle")] + ([("routed", decision)] if decision != "pinned" else [])
    for label, which in named:
        results.rows += [replace(row, model=f"{name}_{label}") for row in routed.by_decision[which]]
    results.routed = routed


def answers(prepared: Prepared, model: Any, most_tokens: int = 40) -> list[dict[str, Any]]:
    """Returns one routed answer for each domain: to the first held-out prompt that leaves room for one."""
    room = getattr(prepared.base.config, "max_position_embeddings", None) or 1 << 30
    shown = []
    for domain, examples in prepared.held.items():
        fitting = (e for e in examples if e.encoded.prompt_length + most_tokens <= room)
        example = next(fitting, None)
        if example is None or example.record is None:
            continue
        prompt = torch.tensor([example.encoded.input_ids[: example.encoded.prompt_length]], device=model.device)
        pinned = model.peft_config[ADAPTER].decision == "pinned"
        route = model.route(input_ids=prompt, expert=domain if pinned else None)[0]
        written = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            expert=route.expert,
            max_new_tokens=most_tokens,
            do_sample=False,
            pad_token_id=prepared.pad,
        )
        answer = prepared.tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        shown.append(
            {
                "domain": domain,
                "prompt": example.record.prompt,
                "expert": route.expert,
                "probability": round(route.probabilities[route.expert], 4),
                "answer": answer.strip(),
                "reference": example.record.response,
            }
        )
    return shown


def _save(model: PeftModel, folder: Path) -> None:
    """Saves the adapter alone. The embeddings are frozen, and asking would mean looking the base up on the Hub."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def measure_run(experiment: Experiment, run: RunFolder, console: Console) -> dict[str, Any]:
    """Measures a finished run's model again and returns what results.json would hold of it. Writes nothing.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    check_trained(run)
    started = time.monotonic()
    prepared = prepare(experiment, console, new=False)
    model = load_adapter(prepared.base, run.model)
    if method_named(experiment.method).router is not None and prepared.domains != model.experts:
        raise DataError(
            f"{run.path}: the data now has the domains {', '.join(prepared.domains)}, the model's experts are "
            f"{', '.join(model.experts)}. Expected the same, in the same order; restore the data of "
            "the run."
        )
    results = Results()
    if method_named(experiment.method).router is None:
        results.rows += rows_of("mixed", score_domains(model, prepared.held, pad_token_id=prepared.pad))
    else:
        measure(prepared, model, results)
        results.examples = answers(prepared, model)
    results.seconds = time.monotonic() - started
    return results.as_dict(prepared.domains, experiment.method)
