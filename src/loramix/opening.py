"""Opens what finished runs left: adapters, experts, a model ready to answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from loramix.adapters.adapter import read_adapter
from loramix.adapters.lora import Lora, as_lora
from loramix.adapters.mixture import check_mixture
from loramix.errors import LoramixError, ModelError, Problems
from loramix.experiment import load
from loramix.methods import Method, method_named
from loramix.models import load_base, load_tokenizer
from loramix.run_folder import RunFolder
from loramix.settings import Experiment

ADAPTER = "default"
"""Name of the adapter of every run, as PEFT names an only adapter."""


def check_trained(run: RunFolder, method: Method) -> None:
    """Raises a ModelError if the run has no trained model, or an adapter that is not whole; nothing is loaded yet."""
    expected = "config.json" if method.tuner == "none" else "adapter_config.json"
    if not (run.model / expected).is_file():
        raise ModelError(f"{run.path}: the run has no trained model (model/ is missing). Train it to the end first.")
    if method.tuner == "loramix":
        check_mixture(read_adapter(run.model))


def load_adapter(base: Any, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """Returns the base with the adapter of a folder on it, ready to answer, or to be trained on.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder), adapter_name=ADAPTER, is_trainable=is_trainable).eval()
    except LoramixError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: the adapter cannot be read ({str(error).splitlines()[0]}). Train it anew."
        ) from error


def load_trained(base: Any, run: RunFolder, method: Method) -> Any:
    """Returns a run's model, ready to answer: the base with the adapter on it, or the trained base itself.

    Raises:
        ModelError: it is missing or damaged.
    """
    if method.tuner == "none":
        return load_base(str(run.model), dtype=str(base.dtype).removeprefix("torch."))
    return load_adapter(base, run.model)


def open_model(experiment: Experiment, run: RunFolder) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a finished run, ready to answer.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    method = method_named(experiment.method)
    check_trained(run, method)
    base = load_base(experiment.model_name_or_path, **experiment.base_form())
    return load_trained(base, run, method), load_tokenizer(experiment.model_name_or_path)


def open_run(path: str | Path) -> tuple[RunFolder, Experiment]:
    """Returns the folder and the settings of a run, whose data need not be there.

    Raises:
        ConfigError: there is no run, or its settings are damaged.
    """
    run = RunFolder.opened(path)
    return run, load(run.config, with_data=False).experiment


def load_experts(run: RunFolder, domains: Sequence[str]) -> dict[str, Lora]:
    """Returns the experts that stage 1, or an import, left in a run's folder.

    Raises:
        ModelError: one is missing or damaged; all at once.
    """
    problems = Problems(f"the experts in {run.path}")
    experts: dict[str, Lora] = {}
    for domain in domains:
        if not run.expert(domain).is_dir():
            there = sorted(p.name for p in run.expert(domain).parent.glob("*") if p.is_dir())
            problems.add(
                f"{domain}: no expert of that name. There are: {', '.join(there) or 'none'}. Name the domains as the "
                "experts are named."
            )
            continue
        try:
            experts[domain] = as_lora(read_adapter(run.expert(domain)))
        except ModelError as error:
            problems.add(str(error))
    problems.raise_as(ModelError)
    return experts
