"""Makes a mixture from adapters that exist already: ordinary PEFT LoRA folders, Hub names, or our own export.

The adapters take the place of stage 1 of a run. What follows is the method's last stage: nothing for arrow, routers or
weights from a few examples for moa and lorahub (`loramix train RUN --stage ...`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loramix.adapters.adapter import read_adapter, write_adapter
from loramix.adapters.alike import alike, short_targets
from loramix.adapters.hub import adapter_folder
from loramix.adapters.lora import Lora, as_lora, lora_adapter
from loramix.building import save, train_method, with_method
from loramix.data.domains import name_problem
from loramix.environment import environment
from loramix.errors import ConfigError, LoramixError, ModelError, Problems
from loramix.experiment import as_yaml
from loramix.experiment import build as build_experiment
from loramix.experts import linear_sizes
from loramix.methods import method_named
from loramix.models import load_skeleton
from loramix.models.base import base_folder
from loramix.opening import ADAPTER
from loramix.preparation import anchored, without_data
from loramix.run_folder import RunFolder, write_json, write_text_safely
from loramix.settings import BUILTIN, Experiment
from loramix.tuner.assembly import put_experts


def read_loras(sources: Mapping[str, str]) -> dict[str, Lora]:
    """Returns the named adapters, read and checked by themselves.

    Args:
        sources: expert's name -> folder or Hub name.

    Raises:
        ModelError, ConfigError: all that is wrong with all of them: names, files, settings, the same adapter twice.
    """
    problems = Problems("the adapters")
    found: dict[str, Lora] = {}
    prints: dict[str, str] = {}
    if len(sources) < 2:
        problems.add(f"{len(sources)} given. A mixture needs at least two: NAME=FOLDER NAME=FOLDER ...")
    for name, source in sources.items():
        if wrong := name_problem(name):
            problems.add(wrong)
            continue
        try:
            adapter = read_adapter(adapter_folder(source))
            found[name] = as_lora(adapter)
        except LoramixError as error:
            problems.add(f"{name}: {error}")
            continue
        same = prints.setdefault(adapter.fingerprint(), name)
        if same != name:
            problems.add(f"{name} and {same} hold the same tensors. Give each expert a name and an adapter of its own.")
    problems.raise_as(ModelError)
    return found


def base_of(experts: Mapping[str, Lora], given: str | None, *, any_base_name: bool = False) -> str:
    """Returns the base that all experts were trained on.

    Args:
        experts: by name.
        given: what the user says it is, if he does.
        any_base_name: take his word for it, whatever name the adapters give; sizes are checked all the same.

    Raises:
        ModelError: the adapters name different bases, or another one than the user; or none, and neither does he.
    """
    named = {name: expert.base for name, expert in experts.items() if expert.base}
    wanted = given or next(iter(named.values()), None)
    if wanted is None:
        raise ModelError("the adapters name no base. Say which one they were trained on: --base NAME.")
    problems = Problems("the adapters")
    for name, base in named.items():
        if not any_base_name and not _same(base, wanted):
            problems.add(
                f"{name} was trained on {base!r}, the mixture is for {wanted!r}. An adapter fits the base it was "
                "trained on and no other. If the two are the same weights, say --base NAME --any-base-name."
            )
    problems.raise_as(ModelError)
    return wanted


def _same(one: str, other: str) -> bool:
    """Whether two names mean the same base: equal, or the same folder."""
    if one == other:
        return True
    folders = []
    for name in (one, other):
        with contextlib.suppress(LoramixError):
            folder = Path(base_folder(name) if name == BUILTIN else name).expanduser()
            folders.append(folder.resolve() if folder.is_dir() else name)
    return len(folders) == 2 and folders[0] == folders[1]


def check_fits(experts: Mapping[str, Lora], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Checks that every module that an expert adapts is a linear layer of the base, of that size.

    Args:
        experts: by name.
        sizes: of the base's linear layers, (in, out) features.

    Raises:
        ModelError: with all that does not fit.
    """
    problems = Problems("the adapters, beside the base")
    for name, expert in experts.items():
        for module, (down_RI, up_OR) in expert.modules.items():
            got = (down_RI.shape[1], up_OR.shape[0])
            if module not in sizes:
                problems.add(f"{name}: adapts {module}, which is no linear layer of the base. It is for another base.")
            elif sizes[module] != got:
                problems.add(f"{name}: {module} has (in, out) features {got}, the base {sizes[module]}.")
    problems.raise_as(ModelError)


def sizes_of(base: str) -> dict[str, tuple[int, int]]:
    """Returns (in, out) features of the linear layers of a base, by name; its weights are not loaded."""
    return {name: found for name, module in load_skeleton(base).named_modules() if (found := linear_sizes(module))}


def import_experts(
    sources: Mapping[str, str],
    output_dir: str,
    *,
    method: str = "moa",
    base: str | None = None,
    any_base_name: bool = False,
    data: Mapping[str, str] | None = None,
    console: Console,
) -> dict[str, Any]:
    """Makes a run whose experts are existing adapters. Nothing is written before all of them are found good.

    Arrow is ready then. A MoA has untaught routers and answers with the expert that the caller pins, until they are
    taught; methods that weigh or train further have their experts and no model yet.

    Args:
        sources: expert's name -> folder or Hub name.
        output_dir: of the run; must hold none.
        method: one that starts from trained experts.
        base, any_base_name: see `base_of`.
        data: expert's name -> file of its domain, for the stage that follows.
        console: where progress is shown.

    Returns:
        what was made of what, as it is written to imported.json.

    Raises:
        ConfigError, ModelError: with all problems.
    """
    chosen = method_named(method)
    if not chosen.starts_from_experts:
        raise ConfigError(
            f"--method {method}: does not start from trained experts. Expected moa, arrow, lorahub, mole or moe-lora."
        )
    given = read_loras(sources)
    name = base_of(given, base, any_base_name=any_base_name)
    sizes = sizes_of(name)
    check_fits(given, sizes)
    experts = alike(given)
    experiment = _experiment(experts, sizes, name, method, output_dir, data or {})
    run = RunFolder(Path(output_dir))
    run.create()
    for expert, lora in experts.items():
        write_adapter(lora_adapter(lora, short_targets(list(lora.modules), list(sizes))), run.expert(expert))
    write_text_safely(run.config, as_yaml(anchored(experiment)))
    write_json(run.environment, environment())
    ready = "no"
    if method in ("arrow", "moa"):
        ready = "yes" if method == "arrow" else "pinned only"
        _put_together(experiment, run, experts, console)
    made = _account(given, experts, name, method, ready)
    write_json(run.path / "imported.json", made)
    return made


def _experiment(
    experts: Mapping[str, Lora],
    sizes: Mapping[str, tuple[int, int]],
    base: str,
    method: str,
    output_dir: str,
    data: Mapping[str, str],
) -> Experiment:
    first = next(iter(experts.values()))
    assert first.plain is not None
    r, alpha, rslora = first.plain
    settings = {
        "output_dir": output_dir,
        "model_name_or_path": base,
        "method": method,
        "data": {"domains": {name: data.get(name) for name in experts}},
        "adapter": {
            "r": r,
            "lora_alpha": int(alpha),
            "use_rslora": rslora,
            "target_modules": short_targets(list(first.modules), list(sizes)),
        },
    }
    return build_experiment(settings, where="the imported mixture", with_data=False).experiment


def _put_together(experiment: Experiment, run: RunFolder, experts: Mapping[str, Lora], console: Console) -> None:
    """Writes the mixture: arrow's as it will stay, MoA's with a router that no one asks."""
    modules = {name: expert.modules for name, expert in experts.items()}
    prepared = without_data(experiment, run, list(experts), console)
    if experiment.method == "moa":
        pinned = experiment.adapter.model_copy(update={"decision": "pinned"})
        prepared.experiment = experiment.model_copy(update={"adapter": pinned})
        model = with_method(prepared)
        put_experts(model.get_base_model(), ADAPTER, modules)
    else:
        model, _ = train_method(prepared, modules)
    save(model, run.model)


def _account(
    given: Mapping[str, Lora], experts: Mapping[str, Lora], base: str, method: str, ready: str
) -> dict[str, Any]:
    shared = next(iter(experts.values())).plain
    return {
        "base": base,
        "method": method,
        "ready": ready,
        "r, lora_alpha, use_rslora": list(shared) if shared else None,
        "experts": [
            {
                "name": name,
                "from": lora.where,
                "modules": len(lora.modules),
                "rank": lora.rank,
                "r, lora_alpha, use_rslora": list(lora.plain) if lora.plain else "differ by module",
                "changed": "nothing"
                if lora.plain == shared and lora.modules.keys() == experts[name].modules.keys()
                else "filled up with zeros, scaling in B",
            }
            for name, lora in given.items()
        ],
    }


def parsed_sources(arguments: Sequence[str], what: str = "NAME=FOLDER") -> dict[str, str]:
    """Returns name -> value of `name=value` texts.

    Raises:
        ConfigError: one that is none, or a name twice; all at once.
    """
    problems = Problems("the arguments")
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name or not value:
            problems.add(f"{argument!r}: expected {what}.")
        elif name in found:
            problems.add(f"{name}: given twice.")
        found[name] = value
    problems.raise_as(ConfigError)
    return found
