"""Builds and trains the models of an experiment: each from the base, by the stages of its method."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import set_seed

from loramix.adapter_settings import adapter_config, together_config
from loramix.adapters.adapter import replace_folder
from loramix.budget import expert_settings, joint_settings, steps
from loramix.data.collation import Example
from loramix.evaluation.scoring import score
from loramix.methods import Method, method_named
from loramix.opening import ADAPTER
from loramix.preparation import Prepared
from loramix.processes import meet, writes
from loramix.routers.sequence import SequenceRouter
from loramix.training.gradient_free import search_weights
from loramix.training.prompt_states import prompt_states
from loramix.training.router_fit import RouterFit, fit_routers
from loramix.training.settings import TrainingSettings
from loramix.training.stages import train_stage
from loramix.training.together import train_in_one_batch
from loramix.tuner.assembly import Expert, put_experts, take_expert
from loramix.tuner.guide import ForwardGuide
from loramix.tuner.layer import LoramixLinear


def with_lora(prepared: Prepared, expert: str) -> PeftModel:
    """Returns the base with one fresh LoRA on it, of the experiment's rank and targets."""
    set_seed(prepared.experiment.seed)
    config = adapter_config(prepared.experiment, prepared.domains, "lora", expert)
    return get_peft_model(prepared.base, config, adapter_name=ADAPTER)


def with_method(prepared: Prepared) -> Any:
    """Returns the base with the experiment's method on it, untrained."""
    set_seed(prepared.experiment.seed)
    method = method_named(prepared.experiment.method)
    if method.tuner == "none":
        return prepared.base.requires_grad_(True)
    if method.tuner == "prefix":
        tokens = prepared.experiment.adapter.num_virtual_tokens or method.defaults["num_virtual_tokens"]
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
        return get_peft_model(prepared.base, config, adapter_name=ADAPTER)
    return get_peft_model(prepared.base, adapter_config(prepared.experiment, prepared.domains), adapter_name=ADAPTER)


def train_on(
    prepared: Prepared,
    model: Any,
    title: str,
    domains: Sequence[str],
    settings: TrainingSettings,
    losses: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Trains a model on some domains and returns what the stage saw."""
    shares = prepared.shares() if len(domains) > 1 else dict.fromkeys(domains, 1.0)
    log_bytes = 0 if prepared.journal is None else prepared.journal.log_bytes
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
        auxiliary=losses,
        kinds=prepared.kinds(),
        keeper=None if prepared.keeping is None else prepared.keeping.stage(title, settings, log_bytes),
    )


def train_together(prepared: Prepared, folders: Mapping[str, Path], title: str) -> dict[str, dict[str, Any]]:
    """Trains the experts of all domains in one batch, saves each as if it had been trained alone, and returns what each
    has seen.

    Args:
        prepared: data and base.
        folders: where the expert of each domain is saved.
        title: for the bar, the log and the checkpoints.
    """
    settings, domains = expert_settings(prepared.experiment), prepared.domains
    model = with_lora(prepared, domains[0])
    fresh = take_expert(model.get_base_model(), ADAPTER)
    prepared.base = model.unload()
    model = get_peft_model(prepared.base, together_config(prepared.experiment, domains), adapter_name=ADAPTER)
    put_experts(model.get_base_model(), ADAPTER, dict.fromkeys(domains, fresh))
    for door in doors_of(model).values():
        door.router(ADAPTER).requires_grad_(False)
    log_bytes = 0 if prepared.journal is None else prepared.journal.log_bytes
    seen = train_in_one_batch(
        model,
        {domain: prepared.train[domain] for domain in domains},
        [steps(settings, len(prepared.train[domain])) for domain in domains],
        title=title,
        settings=settings,
        pad_token_id=prepared.pad,
        output_dir=prepared.run.path,
        log_file=prepared.run.log,
        console=prepared.console,
        keeper=None if prepared.keeping is None else prepared.keeping.stage(title, settings, log_bytes),
    )
    experts = [take_expert(model.get_base_model(), ADAPTER, position) for position in range(len(domains))]
    prepared.base = model.unload()
    for domain, expert in zip(domains, experts, strict=True):
        model = with_lora(prepared, domain)
        put_experts(model.get_base_model(), ADAPTER, {domain: expert})
        save(model, folders[domain])
        prepared.base = model.unload()
    return dict(zip(domains, seen, strict=True))


def train_method(
    prepared: Prepared, experts: dict[str, Expert], domains: Sequence[str] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Returns the experiment's method after its last stage, and what the stage saw.

    Args:
        prepared: data and base; the base is taken over by the model.
        experts: what stage 1 trained, for methods that start from it.
        domains: what the stage learns; all domains by default.
    """
    method = method_named(prepared.experiment.method)
    stage = method.stages[-1]
    model = with_method(prepared)
    if method.starts_from_experts:
        put_experts(model.get_base_model(), ADAPTER, experts)
    if stage.search is not None:
        return model, _search(prepared, model, method)
    if not stage.trains:
        return model.eval(), {"steps": 0, "tokens": 0, "seconds": 0.0, "loss": None}
    settings = joint_settings(prepared.experiment)
    losses = {**method.losses, **settings.losses}
    title = f"{method.name}: {' and '.join(stage.trains)}"
    return model, train_on(prepared, model, title, domains or prepared.domains, settings, losses)


def teach_routers(prepared: Prepared, experts: dict[str, Expert]) -> tuple[Any, dict[str, Any]]:
    """Returns the experiment's method with its experts as they are and its routers taught, and what was seen.

    Only sequence routers can be taught so; see training/router_fit.py.
    """
    started = time.monotonic()
    model = with_method(prepared)
    put_experts(model.get_base_model(), ADAPTER, experts)
    prompts = [
        (e.encoded.input_ids[: e.encoded.prompt_length], e.domain_id) for d in prepared.train.values() for e in d
    ]
    prepared.console.print(f"reading {len(prompts)} prompts for the routers ...", highlight=False)
    states = prompt_states(model, prompts, pad_token_id=prepared.pad)
    settings = joint_settings(prepared.experiment)
    fit = RouterFit(learning_rate=settings.router_learning_rate, seed=settings.seed)
    losses = fit_routers(routers_of(model), states, torch.tensor([domain for _, domain in prompts]), fit)
    seen = {"steps": fit.steps, "tokens": sum(len(ids) for ids, _ in prompts)}
    seconds = round(time.monotonic() - started, 1)
    return model.eval(), {**seen, "seconds": seconds, "loss": sum(losses.values()) / len(losses)}


def routers_of(model: Any) -> dict[str, SequenceRouter]:
    """Returns the routers of a sequence-routed model by scope, in forward order."""
    return {scope: door.router(ADAPTER) for scope, door in doors_of(model).items()}


def doors_of(model: Any) -> dict[str, LoramixLinear]:
    """Returns the modules that routers sit at, by scope, in forward order."""
    mixture = ForwardGuide.of(model.get_base_model()).active()
    assert mixture is not None
    return mixture.doors


def _search(prepared: Prepared, model: Any, method: Method) -> dict[str, Any]:
    stage = method.stages[-1]
    assert stage.search is not None
    given = prepared.experiment.search.model_dump(exclude_none=True)
    search = replace(stage.search, **given)
    few: list[Example] = [e for domain in prepared.train.values() for e in domain[: search.examples_per_domain]]

    def loss() -> float:
        scores = score(model, few, pad_token_id=prepared.pad)
        return sum(s.nll for s in scores) / sum(s.tokens for s in scores)

    weights_E = next(p for name, p in model.named_parameters() if name.endswith("weights_E"))
    started = time.monotonic()
    found = search_weights(weights_E, loss, search, seed=prepared.experiment.seed, console=prepared.console)
    seconds = round(time.monotonic() - started, 1)
    return {"steps": 0, "tokens": 0, "examples": len(few), "seconds": seconds, "loss": None, **found}


def save(model: Any, folder: Path) -> None:
    """Saves an adapter alone, or a whole model. With an adapter the embeddings are frozen, and asking PEFT for them
    would mean looking the base up on the Hub. Of several processes the first saves, and none goes on before."""
    # All ask, not the first alone: a base in parts (FSDP2) lets go of what it has gathered when it is asked, and the
    # processes must hold the same.
    weights = model.state_dict()
    if writes():
        _save(model, folder, weights)
    meet()


def _save(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    if isinstance(model, PeftModel):
        # Left to itself PEFT would gather the parts of the frozen base, for which all processes would have to be here.
        own = {name: weight for name, weight in weights.items() if not hasattr(weight, "full_tensor")}
        model.save_pretrained(str(making), save_embedding_layers=False, state_dict=own)
    else:
        model.save_pretrained(str(making))
    making.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(making, folder)  # an interrupt leaves the earlier model whole
