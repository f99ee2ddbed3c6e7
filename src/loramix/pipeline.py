"""An experiment from its settings to its results: read, train the stages and the controls, measure, write.

Order: stage 1 where the method has it (each expert alone; also the single-LoRA baseline), the control that trains each
of them on, the mixed control, then the method. Each trained model is measured as soon as it exists, so a run is one
pass over one base.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loramix.adapter_settings import adapter_config
from loramix.adapters.adapter import read_adapter
from loramix.budget import all_stages, expert_settings, longer
from loramix.building import save, teach_routers, train_method, train_on, with_lora
from loramix.data.collation import Example
from loramix.errors import ConfigError, DataError, did_you_mean
from loramix.evaluation.evaluate import RoutedResult, Row, measure_routed, rows_of, score_domains
from loramix.evaluation.generation import answer
from loramix.evaluation.scoring import Score
from loramix.going_on import check_scaling, earlier_rows, experts_for, keep_calibration
from loramix.methods import method_named
from loramix.opening import ADAPTER, check_trained, load_adapter, load_trained
from loramix.preparation import Prepared, prepare, record
from loramix.prompt_store import prompts_of, write_prompts
from loramix.run_folder import RunFolder, write_json
from loramix.settings import Experiment
from loramix.training.settings import TrainingSettings
from loramix.tuner.assembly import Expert, take_expert


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
            content["router_calibration"] = asdict(routers.calibration)
            content["perplexity_by_decision"] = {
                decision: {row.domain: row.perplexity for row in rows_of(decision, scores)}
                for decision, scores in self.routed.by_decision.items()
            }
        content["examples"] = self.examples
        content["stages"] = self.stages
        content["seconds"] = round(self.seconds, 1)
        return content


def run_experiment(experiment: Experiment, console: Console, stage: str | None = None) -> dict[str, Any]:
    """Trains and measures everything the experiment asks for and returns the content of results.json.

    Args:
        experiment: the settings.
        console: where progress is shown.
        stage: one stage alone, see `stages_of`; a later one than "experts" goes on from the experts in the run's
            folder.

    Raises:
        ConfigError: the method has no such stage.
        ModelError: an expert to go on from is missing or damaged.
    """
    started = time.monotonic()
    _check_stage(experiment.method, stage)
    if stage not in (None, "experts"):
        return _go_on(experiment, console, str(stage), started)
    prepared = prepare(experiment, console)
    results = Results()
    if "base" in experiment.controls:
        console.print("measuring the base ...", highlight=False)
        results.rows += rows_of("base", score_domains(prepared.base, prepared.held, pad_token_id=prepared.pad))
    method = method_named(experiment.method)
    if method.expert_count == "one":
        _train_one(prepared, results, prepared.run.model, expert_settings(prepared))
    else:
        experts = _train_experts(prepared, results) if method.starts_from_experts else {}
        if stage is None:
            if "mixed" in experiment.controls:
                _train_one(prepared, results, prepared.run.mixed, all_stages(prepared))
            _train_method(prepared, results, experts)
    return _finished(prepared, results, started)


def stages_of(method: str) -> list[str]:
    """Returns what can be trained by itself: the method's stages where it has several; and routers alone, with the
    experts as they are, where a label teaches them."""
    known = method_named(method)
    names = [stage.name for stage in known.stages] if known.starts_from_experts else []
    return [*names, "routers"] if "routing_cross_entropy" in known.losses else names


def _check_stage(method: str, stage: str | None) -> None:
    if stage is not None and stage not in (known := stages_of(method)):
        raise ConfigError(
            f"--stage {stage}: method {method} has {'the stages ' + ', '.join(known) if known else 'one stage'}. "
            f"{'Name one of them.' if known else 'Leave --stage out.'}{did_you_mean(stage, known)}"
        )


def _go_on(experiment: Experiment, console: Console, stage: str, started: float) -> dict[str, Any]:
    """A later stage, from the experts that lie in the run's folder: left by stage 1, or imported."""
    run = RunFolder.opened(experiment.output_dir)
    prepared = prepare(experiment, console, new=False)
    experts = experts_for(prepared, stage)
    check_scaling(experts, adapter_config(experiment, prepared.domains))
    before = read_adapter(run.model) if (run.model / "adapter_config.json").is_file() else None
    results = Results()
    rows, results.stages = earlier_rows(run, prepared.data.counts)
    results.rows = [Row(**row) for row in rows]
    measured = {(row.model, row.domain) for row in results.rows}
    for domain in prepared.domains:
        if "base" in experiment.controls and ("base", domain) not in measured:
            results.rows += rows_of("base", _own_domain(prepared, prepared.base, domain))
        if ("single", domain) not in measured:
            model = load_adapter(prepared.base, run.expert(domain))
            results.rows += rows_of("single", _own_domain(prepared, model, domain))
            prepared.base = model.unload()
    _train_method(prepared, results, {name: expert.modules for name, expert in experts.items()}, stage)
    if not keep_calibration(run, before):
        console.print("the calibration no longer holds: run `loramix calibrate` again.", highlight=False)
    return _finished(prepared, results, started)


def _finished(prepared: Prepared, results: Results, started: float) -> dict[str, Any]:
    results.seconds = time.monotonic() - started
    content = results.as_dict(prepared.domains, prepared.experiment.method)
    write_json(prepared.run.results, content)
    return content


def _train_experts(prepared: Prepared, results: Results) -> dict[str, Expert]:
    """Stage 1: each expert alone, measured on its own domain; and the same trained on, if asked for."""
    experts: dict[str, Expert] = {}
    for domain in prepared.domains:
        model = with_lora(prepared, domain)
        title = f"expert {domain}"
        results.stages[title] = train_on(prepared, model, title, [domain], expert_settings(prepared))
        save(model, prepared.run.expert(domain))
        experts[domain] = take_expert(model.get_base_model(), ADAPTER)
        results.rows += rows_of("single", _own_domain(prepared, model, domain))
        if "single_long" in prepared.experiment.controls:
            title = f"longer {domain}"
            results.stages[title] = train_on(prepared, model, title, [domain], longer(prepared, domain))
            save(model, prepared.run.longer(domain))
            results.rows += rows_of("single_long", _own_domain(prepared, model, domain))
        prepared.base = model.unload()
    return experts


def _own_domain(prepared: Prepared, model: Any, domain: str) -> dict[str, list[Score]]:
    return score_domains(model, {domain: prepared.held[domain]}, pad_token_id=prepared.pad)


def _train_one(prepared: Prepared, results: Results, folder: Path, settings: TrainingSettings) -> None:
    """One LoRA on all domains."""
    model = with_lora(prepared, "mixed")
    results.stages["mixed"] = train_on(prepared, model, "mixed", prepared.domains, settings)
    save(model, folder)
    results.rows += rows_of("mixed", score_domains(model, prepared.held, pad_token_id=prepared.pad))
    prepared.base = model.unload()


def _train_method(prepared: Prepared, results: Results, experts: dict[str, Expert], stage: str | None = None) -> None:
    """The method's last stage, or its routers alone; measured, for a routed one under every decision; one answer for
    each domain."""
    name = prepared.experiment.method
    stage = stage or method_named(name).stages[-1].name
    train = teach_routers if stage == "routers" else train_method
    model, results.stages[stage] = train(prepared, experts)
    record(prepared)  # settings under which a stage failed are not the run's
    save(model, prepared.run.model)
    if method_named(name).settled_by == "prompt":
        most = prepared.experiment.data.stored_prompts
        write_prompts(prepared.run.prompts, {d: prompts_of(part, most) for d, part in prepared.train.items()})
    prepared.console.print(f"measuring {name} ...", highlight=False)
    measure(prepared, model, results)
    write_json(prepared.run.results, results.as_dict(prepared.domains, name))
    results.examples = answers(prepared, model)


def measure(prepared: Prepared, model: Any, results: Results) -> None:
    """Measures the experiment's model: a row for each domain, or under the oracle and its own decision if it settles
    experts by prompt."""
    method = method_named(prepared.experiment.method)
    name = "mixed" if method.expert_count == "one" else method.name
    if method.settled_by != "prompt":
        told = method.settled_by == "domain"
        experts = [e.domain_id for examples in prepared.held.values() for e in examples] if told else None
        scores = score_domains(model, prepared.held, pad_token_id=prepared.pad, experts=experts)
        results.rows += rows_of(name, scores)
        return
    routed = measure_routed(model, prepared.held, pad_token_id=prepared.pad)
    decision = model.peft_config[ADAPTER].decision
    if decision not in routed.by_decision and decision != "pinned":
        scores = score_domains(model, prepared.held, pad_token_id=prepared.pad, decision=decision)
        routed.by_decision[decision] = scores
    named = [("oracle", "oracle")] + ([("routed", decision)] if decision != "pinned" else [])
    for label, which in named:
        results.rows += rows_of(f"{name}_{label}", routed.by_decision[which])
    results.routed = routed


def answers(prepared: Prepared, model: Any, most_tokens: int = 40) -> list[dict[str, Any]]:
    """Returns one answer for each domain: to the first held-out prompt that leaves room for one."""
    room = getattr(prepared.base.config, "max_position_embeddings", None) or 1 << 30
    how = method_named(prepared.experiment.method).settled_by
    chosen: dict[str, Example] = {}
    for domain, examples in prepared.held.items():
        fitting = (e for e in examples if e.encoded.prompt_length + most_tokens <= room and e.record is not None)
        if (example := next(fitting, None)) is not None:
            chosen[domain] = example
    asked = list(chosen.values())
    written = answer(model, prepared.tokenizer, asked, settled_by=how, max_new_tokens=most_tokens)
    return [
        {
            "domain": domain,
            "prompt": example.record.prompt,
            **(_expert_said(model, example, domain) if how == "prompt" else {}),
            "answer": text,
            "reference": example.record.response,
        }
        for (domain, example), text in zip(chosen.items(), written, strict=True)
        if example.record is not None
    ]


def _expert_said(model: Any, example: Example, domain: str) -> dict[str, Any]:
    """Returns which expert answers a prompt, and how sure its decision was."""
    prompt = torch.tensor([example.encoded.input_ids[: example.encoded.prompt_length]], device=model.device)
    pinned = model.peft_config[ADAPTER].decision == "pinned"
    route = model.route(input_ids=prompt, expert=domain if pinned else None)[0]
    return {"expert": route.expert, "probability": None if route.probability is None else round(route.probability, 4)}


def measure_run(experiment: Experiment, run: RunFolder, console: Console) -> dict[str, Any]:
    """Measures a finished run's model again and returns what results.json would hold of it. Writes nothing.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    method = method_named(experiment.method)
    check_trained(run, method)
    started = time.monotonic()
    prepared = prepare(experiment, console, new=False)
    model = load_trained(prepared.base, run, method)
    known = prepared.domains
    if method.router is not None:
        config = model.peft_config[ADAPTER]
        known = config.domains or (config.experts if method.expert_count == "one per domain" else known)
    if prepared.domains != known:
        raise DataError(
            f"{run.path}: the data now has the domains {', '.join(prepared.domains)}, the model's experts are "
            f"{', '.join(known)}. Expected the same, in the same order; restore the data of the run."
        )
    results = Results()
    measure(prepared, model, results)
    if method.expert_count != "one":
        results.examples = answers(prepared, model)
    results.seconds = time.monotonic() - started
    return results.as_dict(prepared.domains, experiment.method)
