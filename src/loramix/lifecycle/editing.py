"""Experts of a run listed, renamed, taken out or taken along. What is not named stays bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramix.adapters.adapter import Adapter, read_adapter, write_adapter
from loramix.adapters.alike import short_targets
from loramix.adapters.growth import without_expert
from loramix.adapters.lora import lora_adapter
from loramix.adapters.mixture import check_mixture, renamed, take_lora
from loramix.errors import ConfigError
from loramix.experiment import as_yaml, build
from loramix.lifecycle.importing import sizes_of
from loramix.lifecycle.renaming import renamed_in
from loramix.methods import method_named
from loramix.opening import check_trained, open_run
from loramix.prompt_store import read_prompts, write_prompts
from loramix.run_folder import RunFolder, staged_text, write_json
from loramix.settings import Experiment
from loramix.yaml_text import parse_yaml


def mixture_of(run: RunFolder, experiment: Experiment) -> Adapter:
    """Returns the adapter of a run, checked.

    Raises:
        ConfigError: its method has no loramix adapter.
        ModelError: it is missing, damaged, or not whole.
    """
    method = method_named(experiment.method)
    if method.tuner != "loramix":
        raise ConfigError(f"{run.path}: method {method.name} has no LoRA experts ({method.summary}).")
    check_trained(run, method)
    return read_adapter(run.model)


def about_experts(path: Path) -> list[dict[str, Any]]:
    """Returns what is known of each expert of a run: name, rank, modules, parameters, size of its change, prompts."""
    run, experiment = open_run(path)
    adapter = mixture_of(run, experiment)
    config = check_mixture(adapter)
    prompts = read_prompts(run.prompts)
    found = []
    for position, name in enumerate(config.experts or []):
        banks = {k.removesuffix(".A_ERI"): t for k, t in adapter.tensors.items() if k.endswith(".A_ERI")}
        parameters, square = 0, 0.0
        for key, downs_ERI in banks.items():
            ups_EOR = adapter.tensors[f"{key}.B_EOR"]
            if position >= max(len(downs_ERI), len(ups_EOR)):
                continue  # an allocation gives this layer fewer experts
            down_RI, up_OR = downs_ERI[position % len(downs_ERI)].double(), ups_EOR[position % len(ups_EOR)].double()
            parameters += down_RI.numel() + up_OR.numel()
            # ||B A||^2 = trace(A^T B^T B A), without the O x I matrix.
            square += float(((up_OR.T @ up_OR) * (down_RI @ down_RI.T)).sum())
        source = experiment.data.domains.get(name)
        found.append(
            {
                "name": name,
                "rank": config.rank,
                "modules": len(banks),
                "parameters": parameters,
                "norm": round(config.scaling * square**0.5, 4),
                "data": source if isinstance(source, str) or source is None else str(source),
                "stored_prompts": len(prompts.get(name, [])),
            }
        )
    return found


def rename_expert(path: Path, old: str, new: str) -> None:
    """Gives an expert another name, everywhere in a run.

    Raises:
        ConfigError: no such expert, or a name that cannot be one or is taken.
    """
    run, experiment = open_run(path)
    adapter = renamed(mixture_of(run, experiment), old, new)
    _refuse_labelled(experiment, f"rename {old}")
    with _rewritten(run, experiment, lambda name: new if name == old else name):
        write_adapter(adapter, run.model)
        for before, after in ((run.expert(old), run.expert(new)), (run.longer(old), run.longer(new))):
            if before.is_dir():
                before.rename(after)


def remove_expert(path: Path, name: str) -> None:
    """Takes an expert out of a run: its part of the mixture, folder, stored prompts, and domain in the settings.

    Raises:
        ConfigError: no such expert, or the mixture cannot be without it.
    """
    run, experiment = open_run(path)
    adapter = without_expert(mixture_of(run, experiment), name)
    _refuse_labelled(experiment, f"remove {name}")
    with _rewritten(run, experiment, lambda one: None if one == name else one):
        write_adapter(adapter, run.model)
    for folder in (run.expert(name), run.longer(name)):
        shutil.rmtree(folder, ignore_errors=True)


def extract_expert(path: Path, name: str, folder: Path) -> dict[str, Any]:
    """Writes one expert of a run as an ordinary PEFT LoRA ("Single-LoRA of MoA") and returns its settings.

    Raises:
        ConfigError: no such expert, its method's experts are none by themselves, or the folder is not empty.
    """
    run, experiment = open_run(path)
    adapter = mixture_of(run, experiment)
    lora = take_lora(adapter, check_mixture(adapter), name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not an empty folder. Name a new one.")
    targets = short_targets(list(lora.modules), list(sizes_of(experiment.model_name_or_path)))
    plain = lora_adapter(lora, targets)
    write_adapter(plain, folder)
    return plain.config


def _refuse_labelled(experiment: Experiment, what: str) -> None:
    if experiment.data.path is not None:
        raise ConfigError(
            f"{what}: the run's domains are the labels in {experiment.data.path}, which this would contradict. Change "
            "the labels there and train anew, or name a file for each domain in config.yaml first."
        )


def checked_yaml(experiment: Experiment) -> str:
    """Returns settings as they are written to a run.

    Raises:
        ConfigError: they contradict each other, so the run could not be opened any more.
    """
    text = as_yaml(experiment)
    build(parse_yaml(text), where="the run's settings afterwards; nothing was changed", with_data=False)
    return text


@contextmanager
def _rewritten(run: RunFolder, experiment: Experiment, change: Callable[[str], str | None]) -> Iterator[None]:
    """Readies settings with domains renamed, or dropped where `change` gives none; lets the caller write the rest; then
    puts them in place, and changes what was stored and measured likewise."""

    def changed(by_name: Any) -> Any:
        if not isinstance(by_name, Mapping):
            return by_name
        return {to: value for name, value in by_name.items() if (to := change(name)) is not None}

    data = experiment.data
    names = ("domains", "max_train_examples", "max_test_examples", "mixing_weights", "kinds", "split_in")
    update = {name: changed(getattr(data, name)) for name in names}
    whole = experiment.model_copy(update={"data": data.model_copy(update=update)})
    with staged_text(run.config, checked_yaml(whole)):
        yield
    write_prompts(run.prompts, changed(read_prompts(run.prompts)))
    for file in (run.results, run.abstention):
        if file.is_file():
            write_json(file, renamed_in(json.loads(file.read_text(encoding="utf-8")), change))
