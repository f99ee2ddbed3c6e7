"""Opens what finished runs left: adapters, experts, a model ready to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from loramix.errors import LoramixError, ModelError
from loramix.models import load_base, load_tokenizer
from loramix.preparation import Prepared
from loramix.run_folder import RunFolder
from loramix.settings import Experiment
from loramix.tuner.assembly import Expert, take_expert

ADAPTER = "default"
"""Name of the adapter of every run, as PEFT names an only adapter."""


def check_trained(run: RunFolder) -> None:
    """Raises a ModelError if the run has no trained model."""
    if not (run.model / "adapter_config.json").is_file():
        raise ModelError(f"{run.path}: the run has no trained model (model/ is missing). Train it to the end first.")


def load_adapter(base: Any, folder: Path) -> PeftModel:
    """Returns the base with the adapter of a folder on it, ready to answer.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder), adapter_name=ADAPTER).eval()
    except LoramixError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: the adapter cannot be read ({str(error).splitlines()[0]}). Train it anew."
        ) from error


def open_model(experiment: Experiment, run: RunFolder) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a finished run, ready to answer.

    Raises:
        ModelError: the adapter is missing or damaged.
    """
    check_trained(run)
    base = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
    return load_adapter(base, run.model), load_tokenizer(experiment.model_name_or_path)


def load_experts(prepared: Prepared) -> dict[str, Expert]:
    """Returns the experts that stage 1 of a finished run left in its folder."""
    experts: dict[str, Expert] = {}
    for domain in prepared.domains:
        model = load_adapter(prepared.base, prepared.run.expert(domain))
        experts[domain] = take_expert(model.get_base_model(), ADAPTER)
        prepared.base = model.unload()
    return experts
