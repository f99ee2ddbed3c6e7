"""A new expert joins a run: trained alone, then made known to the routers beside the experts that are there.

The old experts and what routers say of them stay bit for bit (adapters/growth.py). The routers learn the new score from
the new domain's prompts and from the stored ones of the old domains; without stored prompts they cannot see what they
lose, and that is said.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from loramix.adapters.adapter import read_adapter, write_adapter
from loramix.adapters.growth import Score, growth_problem, with_expert
from loramix.adapters.lora import as_lora
from loramix.adapters.mixture import check_mixture, new_name_problem
from loramix.budget import expert_settings
from loramix.building import doors_of, routers_of, save, train_on, with_lora
from loramix.data.collation import Example
from loramix.errors import ConfigError, Problems
from loramix.evaluation.scoring import perplexity, score
from loramix.experiment import build
from loramix.lifecycle.editing import checked_yaml, mixture_of
from loramix.opening import load_adapter, open_run
from loramix.preparation import Prepared, anchored, prepare
from loramix.prompt_store import prompts_of, read_prompts, write_prompts
from loramix.routers.sequence import SequenceRouter
from loramix.run_folder import RunFolder, write_text_safely
from loramix.settings import DataSettings, Experiment
from loramix.training.prompt_states import Prompt, prompt_states
from loramix.training.router_fit import RouterFit, fit_added
from loramix.tuner import LoramixConfig
from loramix.tuner.decisions import last_scope_needed


@dataclass
class Added:
    """What adding an expert gave.

    Attributes:
        name: of the expert.
        examples: it was trained on.
        perplexity: of its own held-out responses: of the base, and of the expert alone.
        found: share of its held-out prompts that the deciding router sends to it.
        kept: share of each old domain's stored prompts that still go where they went before; empty without any.
        lost: what could not be looked at, in words; empty where everything was.
    """

    name: str
    examples: int = 0
    perplexity: dict[str, float] = field(default_factory=dict)
    found: float | None = None
    kept: dict[str, float] = field(default_factory=dict)
    lost: str = ""


def add_expert(
    path: Path, name: str, source: str, console: Console, overrides: Sequence[str] = (), *, replay: bool = True
) -> Added:
    """Trains one expert and lets it join a run's mixture. The run is written last, when all of it has gone well.

    Args:
        path: of the run; its method is moa or arrow.
        name: of the new expert and its domain.
        source: data of the domain: file, folder or Hub name.
        console: where progress is shown.
        overrides: `key=value` over the run's settings, for this training.
        replay: use the stored prompts of the old domains.

    Raises:
        ConfigError: the mixture cannot grow, or the name cannot be used.
        DataError: the data cannot be used.
    """
    run, experiment = open_run(path)
    adapter = mixture_of(run, experiment)
    config = check_mixture(adapter)
    problems = Problems(f"adding {name} to {path}")
    for problem in (growth_problem(config), new_name_problem(config, name), _labelled_problem(experiment)):
        if problem is not None:
            problems.add(problem)
    problems.raise_as(ConfigError)
    prepared = _prepared(experiment, config, run, name, source, console, overrides)
    added = Added(name, len(prepared.train[name]))
    making = run.path / f".adding-{name}"
    try:
        _train_alone(prepared, name, making, added)
        trained = read_adapter(making)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    lora = as_lora(trained)
    scores: dict[str, Score] = {}
    mean_D: Tensor | None = None
    new_prompts = prompts_of(prepared.train[name], experiment.data.stored_prompts or 32)
    if config.method == "moa":
        scores, mean_D = _teach(prepared, run, config, name, new_prompts, added, replay)
    changed = with_expert(adapter, name, lora, scores, mean_D)
    data = _with_domain(experiment.data, name, anchored(prepared.experiment).data.domains[name])
    text = checked_yaml(experiment.model_copy(update={"data": data}))
    write_adapter(trained, run.expert(name))
    write_adapter(changed, run.model)
    write_text_safely(run.config, text)
    if config.method == "moa" and experiment.data.stored_prompts:
        write_prompts(run.prompts, {**read_prompts(run.prompts), name: new_prompts})
    return added


def _with_domain(data: DataSettings, name: str, source: Any) -> DataSettings:
    """Returns the data settings with one more domain; mixed by weights, it gets as much as the others on average."""
    update: dict[str, Any] = {"domains": {**data.domains, name: source}}
    update["unseen"] = {domain: one for domain, one in data.unseen.items() if domain != name}  # it is learned now
    if weights := data.mixing_weights:
        update["mixing_weights"] = {**weights, name: sum(weights.values()) / len(weights)}
    return data.model_copy(update=update)


def _labelled_problem(experiment: Experiment) -> str | None:
    if experiment.data.path is None:
        return None
    return (
        f"the run's domains are the labels in {experiment.data.path}. Name a file for each domain in config.yaml first."
    )


def _prepared(
    experiment: Experiment,
    config: LoramixConfig,
    run: RunFolder,
    name: str,
    source: str,
    console: Console,
    overrides: Sequence[str],
) -> Prepared:
    """Returns the new domain's data, and the run's base, for one LoRA of the mixture's form."""
    whole = experiment.model_dump()
    kept = ("max_length", "truncation", "loss_on", "seed", "test_fraction", "stored_prompts", "overlap")
    alone = {
        "output_dir": str(run.path),
        "model_name_or_path": whole["model_name_or_path"],
        "dtype": whole["dtype"],
        "method": "lora",
        "seed": whole["seed"],
        "data": {"domains": {name: source}, **{key: whole["data"][key] for key in kept}},
        "adapter": {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "target_modules": _targets(config),
            "layers_to_transform": whole["adapter"]["layers_to_transform"],
            "exclude_modules": whole["adapter"]["exclude_modules"],
        },
        "training": {**whole["training"], **whole["expert_stage"], "losses": {}},
    }
    return prepare(build(alone, overrides, where="the new expert").experiment, console, new=False)


def _targets(config: LoramixConfig) -> list[str] | str:
    """Returns the mixture's target modules, names or a regular expression."""
    named = config.target_modules or []
    return named if isinstance(named, str) else sorted(named)


def _train_alone(prepared: Prepared, name: str, folder: Path, added: Added) -> None:
    held: list[Example] = prepared.held[name]
    added.perplexity["base"] = perplexity(score(prepared.base, held, pad_token_id=prepared.pad))
    model = with_lora(prepared, name)
    train_on(prepared, model, f"expert {name}", [name], expert_settings(prepared.experiment))
    save(model, folder)
    added.perplexity["expert"] = perplexity(score(model, held, pad_token_id=prepared.pad))
    prepared.base = model.unload()


def _teach(
    prepared: Prepared,
    run: RunFolder,
    config: LoramixConfig,
    name: str,
    new_prompts: Sequence[Sequence[int]],
    added: Added,
    replay: bool,
) -> tuple[dict[str, Score], Tensor | None]:
    """Returns what the new expert adds to each router, by the module it sits at; and where its domain lies, if the
    mixture is calibrated to abstain."""
    names = list(config.experts or [])
    stored = read_prompts(run.prompts) if replay else {}
    without = [one for one in names if not stored.get(one)]
    if without:
        added.lost = (
            f"no stored prompts of {', '.join(without)}: the routers learn {name} without seeing theirs, so prompts of "
            f"these domains may go to {name}, and how many cannot be told here."
        )
        prepared.console.print(added.lost, highlight=False, soft_wrap=True)
    old: list[Prompt] = [(ids, names.index(one)) for one in names for ids in stored.get(one, [])]
    held = [e.encoded.input_ids[: e.encoded.prompt_length] for e in prepared.held[name]]
    model = load_adapter(prepared.base, run.model)
    doors = {routing: door.name for routing, door in doors_of(model).items()}
    # The label's expert is not asked where routers read the base; where they read the running model, the new expert is
    # not in it yet, and its prompts are read with the first one's.
    new: list[Prompt] = [(ids, 0) for ids in new_prompts]
    everything = [*old, *new, *((ids, 0) for ids in held)]
    states = prompt_states(model, everything, pad_token_id=prepared.pad)
    learned = len(old) + len(new)
    labels_N = torch.tensor([label for _, label in old] + [len(names)] * len(new))
    fit = RouterFit(
        learning_rate=expert_settings(prepared.experiment).router_learning_rate, seed=prepared.experiment.seed
    )
    routers = routers_of(model)
    by_scope = {scope: fit_added(router, states[scope][:learned], labels_N, fit) for scope, router in routers.items()}
    decision = str(config.decision)
    scope = last_scope_needed(decision if decision.startswith("layer:") else "last", list(routers))
    shown = torch.cat([states[scope][: len(old)], states[scope][learned:]])
    _look(routers[scope], shown, by_scope[scope], names, old, added)
    mean_D = None
    for where, one in routers.items():
        if (part := one.abstention) is not None:
            mean_D = ((states[where][len(old) : learned] - part.center_I) @ part.whiten_ID).mean(dim=0)
    prepared.base = model.unload()
    return {door: by_scope[scope] for scope, door in doors.items()}, mean_D


def _look(
    router: SequenceRouter, states_NI: Tensor, score: Score, names: Sequence[str], old: Sequence[Prompt], added: Added
) -> None:
    """Counts where the deciding router sends prompts now, and where it sent them before; new prompts come last."""
    with torch.no_grad():
        before_N = router.logits(states_NI).argmax(dim=1)
        after_N = router.with_expert(*score).logits(states_NI).argmax(dim=1)
    same_N = (after_N == before_N).float()[: len(old)]
    labels_N = torch.tensor([label for _, label in old], dtype=torch.int64)
    for position, name in enumerate(names):
        if (labels_N == position).any():
            added.kept[name] = float(same_N[labels_N == position].mean())
    if len(old) < len(after_N):
        added.found = float((after_N[len(old) :] == len(names)).float().mean())
