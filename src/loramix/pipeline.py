"""An experiment from its settings to its results: read, train the stages and the controls, measure, write.

Order: stage 1 (each expert alone; also the single-LoRA baseline), the control that trains each of them on, the mixed
control, then the method. Each trained model is measured as soon as it exists, so a run is one pass over one base.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import set_seed

from loramix.data.prompts import encode_prompts
from loramix.errors import ModelError
from loramix.evaluation.evaluate import RoutedResult, Row, measure_routed, rows_of, score_domains
from loramix.evaluation.scoring import Score
from loramix.experiment import Experiment, adapter_config
from loramix.methods import method_named
from loramix.models import load_base, load_tokenizer
from loramix.preparation import Prepared, prepare
from loramix.run_folder import RunFolder, write_json
from loramix.training.settings import TrainingSettings
from loramix.training.stages import train_stage
from loramix.tuner.assembly import Expert, put_experts, take_expert

ADAPTER = "default"


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


def _both_stages(prepared: Prepared) -> TrainingSettings:
    """Returns settings under which one LoRA sees all domains for as long as stage 1 and stage 2 together."""
    first, second = _expert_settings(prepared), _joint_settings(prepared)
    if first.max_steps > 0 and second.max_steps > 0:
        return replace(first, max_steps=first.max_steps * len(prepared.domains) + second.max_steps)
    return replace(first, num_train_epochs=first.num_train_epochs + second.num_train_epochs)


def _longer(prepared: Prepared) -> TrainingSettings:
    """Returns settings under which one expert goes on alone for as long as stage 2 would train it."""
    second = _joint_settings(prepared)
    if second.max_steps > 0:
        return replace(second, max_steps=max(1, round(second.max_steps / len(prepared.domains))))
    return second


def _stage(
    prepared: Prepared, model: Any, title: str, domains: Sequence[str], settings: TrainingSettings
) -> dict[str, Any]:
    shares = prepared.shares()
    total = sum(shares[domain] for domain in domains)
    return train_stage(
        model,
        {domain: prepared.train[domain] for domain in domains},
        domains=prepared.domains,
        title=title,
        settings=settings,
        shares={domain: shares[domain] / total for domain in domains},
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
            results.stages[title] = _stage(prepared, model, title, [domain], _longer(prepared))
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
    results.examples = answers(prepared, model)


def train_joint(prepared: Prepared, experts: dict[str, Expert]) -> tuple[PeftModel, dict[str, Any]]:
    """Returns the experiment's method trained from its experts, and what the stage saw."""
    name = prepared.experiment.method
    model = _with_adapter(prepared, prepared.domains, name)
    put_experts(model.get_base_model(), ADAPTER, experts)
    seen = _stage(prepared, model, f"{name}: experts and routers", prepared.domains, _joint_settings(prepared))
    return model, seen


def load_experts(prepared: Prepared) -> dict[str, Expert]:
    """Returns the experts that stage 1 of a finished run left in its folder."""
    experts: dict[str, Expert] = {}
    for domain in prepared.domains:
        model = PeftModel.from_pretrained(prepared.base, str(prepared.run.expert(domain)), adapter_name=ADAPTER)
        experts[domain] = take_expert(model.get_base_model(), ADAPTER)
        prepared.base = model.unload()
    return experts


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
    """Returns one routed answer for each domain: the first held-out prompt, the expert that answered, what it wrote."""
    shown = []
    records = {domain: some[0] for domain, some in prepared.records.items()}
    batch = encode_prompts(prepared.tokenizer, [record.prompt for record in records.values()])
    pinned = model.peft_config[ADAPTER].decision == "pinned"
    routes = model.route(**batch, expert=list(records) if pinned else None)
    written = model.generate(
        **batch,
        expert=[route.expert for route in routes],
        max_new_tokens=most_tokens,
        do_sample=False,
        pad_token_id=prepared.pad,
    )
    for (domain, record), route, ids in zip(records.items(), routes, written, strict=True):
        answer = prepared.tokenizer.decode(ids[batch["input_ids"].shape[1] :], skip_special_tokens=True)
        shown.append(
            {
                "domain": domain,
                "prompt": record.prompt,
                "expert": route.expert,
                "probability": round(route.probabilities[route.expert], 4),
                "answer": answer.strip(),
                "reference": record.response,
            }
        )
    return shown


def _save(model: PeftModel, folder: Path) -> None:
    """Saves the adapter alone. The embeddings are frozen, and asking would mean looking the base up on the Hub."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _check_trained(run: RunFolder) -> None:
    if not (run.model / "adapter_config.json").is_file():
        raise ModelError(f"{run.path}: the run has no trained model (model/ is missing). Train it to the end first.")


def open_model(experiment: Experiment, run: RunFolder) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a finished run, ready to answer.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    _check_trained(run)
    base = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
    model = PeftModel.from_pretrained(base, str(run.model), adapter_name=ADAPTER)
    return model.eval(), load_tokenizer(experiment.model_name_or_path)


def measure_run(experiment: Experiment, run: RunFolder, console: Console) -> dict[str, Any]:
    """Measures a finished run's model again and returns what results.json would hold of it. Writes nothing.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    _check_trained(run)
    started = time.monotonic()
    prepared = prepare(experiment, console, new=False)
    model = PeftModel.from_pretrained(prepared.base, str(run.model), adapter_name=ADAPTER).eval()
    results = Results()
    if method_named(experiment.method).router is None:
        results.rows += rows_of("mixed", score_domains(model, prepared.held, pad_token_id=prepared.pad))
    else:
        measure(prepared, model, results)
        results.examples = answers(prepared, model)
    results.seconds = time.monotonic() - started
    return results.as_dict(prepared.domains, experiment.method)
