"""Opens what finished runs left: adapters, experts, a model ready to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from loramix.errors import LoramixError, ModelError
from loramix.methods import Method, method_named
from loramix.models import load_base, load_tokenizer
from loramix.preparation import Prepared
from loramix.run_folder import RunFolder
from loramix.settings import Experiment
from loramix.tuner.assembly import Expert, take_expert

ADAPTER = "default"
"""Name of the adapter of every run, as PEFT names an only adapter."""


def check_trained(run: RunFolder, method: Method) -> None:
    """Raises a ModelError if the run has no trained model."""
    expected = "config.json" if method.tuner == "none" else "adapter_config.json"
    if not (run.model / expected).is_file():
        raise ModelError(f"{run.path}: the run has no trained model (model/ is missing). Train it to the end first.")


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
    base = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
    return load_trained(base, run, method), load_tokenizer(experiment.model_name_or_path)


def load_experts(prepared: Prepared) -> dict[str, Expert]:
    """Returns the experts that stage 1 of a finished run left in its folder."""
    experts: dict[str, Expert] = {}
    for domain in prepared.domains:
        model = load_adapter(prepared.base, prepared.run.expert(domain))
        experts[domain] = take_expert(model.get_base_model(), ADAPTER)
        prepared.base = model.unload()
    return experts
