"""`loramix calibrate RUN`: a run's model learns to leave prompts to the base that no expert fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from loramix.adapters.adapter import Adapter, read_adapter, write_adapter
from loramix.errors import ConfigError, DataError
from loramix.evaluation.abstention import Outside, histogram, left_out, outside
from loramix.experiment import load
from loramix.lifecycle.calibration import Calibration, calibrate, states
from loramix.methods import method_named
from loramix.opening import ADAPTER, check_trained, load_trained
from loramix.preparation import Prepared, prepare
from loramix.run_folder import RunFolder, write_json

_PART = "loramix_router.abstention."
"""What the names of a calibration's tensors hold, after the module's."""


def calibrate_run(path: str | Path, console: Console, keep: float = 0.95) -> dict[str, Any]:
    """Calibrates a finished run's model on the run's own data and returns what abstention.json holds.

    The adapter is written anew in one rename, then abstention.json; nothing else of it changes.

    Args:
        path: of the run.
        console: where progress is shown.
        keep: the share of held-out prompts that still gets an expert.

    Raises:
        ConfigError: there is no run, or its method cannot be calibrated.
        DataError: the data is not what the run learned.
        ModelError: the adapter is missing or damaged.
    """
    run = RunFolder.opened(path)
    experiment = load(run.config).experiment
    method = method_named(experiment.method)
    if method.settled_by != "prompt":
        raise ConfigError(
            f"{path}: method {method.name} settles no expert for a prompt, so there is none to keep from it. Runs of "
            "moa can be calibrated."
        )
    check_trained(run, method)
    prepared = prepare(experiment, console, new=False)
    model = load_trained(prepared.base, run, method)
    experts = list(model.peft_config[ADAPTER].experts)
    if prepared.domains != experts:
        raise DataError(
            f"{run.path}: the data now has the domains {', '.join(prepared.domains)}, the model's experts are "
            f"{', '.join(experts)}. Expected the same, in the same order; restore the data of the run."
        )
    count = sum(len(part) for some in (prepared.train, prepared.held, prepared.data.unseen) for part in some.values())
    console.print(f"reading {count} prompts ...", highlight=False)
    found = calibrate(model, prepared.train, prepared.held, pad_token_id=prepared.pad, keep=keep)
    content = _measured(found, model, prepared)
    write_adapter(_with(read_adapter(run.model), found, model), run.model)
    write_json(run.abstention, content)
    return content


def _with(adapter: Adapter, found: Calibration, model: Any) -> Adapter:
    """Returns the adapter with the calibration in place of any it has."""
    part = model.get_base_model().get_submodule(found.door).router(ADAPTER).abstention
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if _PART not in name}
    tensors |= {f"{found.door}.{_PART}{name}": tensor.cpu() for name, tensor in part.state_dict().items()}
    return replace(adapter, config={**adapter.config, "abstention": asdict(found.config)}, tensors=tensors)


def _measured(found: Calibration, model: Any, prepared: Prepared) -> dict[str, Any]:
    """Returns the content of abstention.json; see docs/abstention.md."""
    config, inside_N = found.config, found.inside()
    part = model.get_base_model().get_submodule(found.door).router(ADAPTER).abstention
    unseen: Mapping[str, Tensor] = {
        domain: part.scores(states(model, some, config.layer, pad_token_id=prepared.pad).to(part.center_I.device)).cpu()
        for domain, some in prepared.data.unseen.items()
    }
    if unseen:
        how, beyond_N = "unseen", torch.cat(list(unseen.values()))
        beyond = {domain: outside(inside_N, scores_M, config.threshold) for domain, scores_M in unseen.items()}
        spread = histogram(inside_N, beyond_N)
    elif len(found.train) > 2:
        how = "left out"
        beyond, others_N, beyond_N = left_out(found.train, found.held, config.keep, config.dims)
        spread = histogram(others_N, beyond_N)
    else:
        how, beyond, spread = "nothing", {}, None
    return {
        **asdict(config),
        "train_prompts": {domain: len(states_NI) for domain, states_NI in found.train.items()},
        "held": {
            domain: {
                "prompts": len(scores_N),
                "kept": float((scores_N.double() <= config.threshold).double().mean()),
                "mean_score": float(scores_N.mean()),
            }
            for domain, scores_N in found.scores.items()
        },
        "against": how,
        "outside": {domain: asdict(one) for domain, one in beyond.items()},
        "mean_auroc": _mean(beyond, "auroc"),
        "mean_abstained": _mean(beyond, "abstained"),
        "histogram": spread,
    }


def _mean(beyond: Mapping[str, Outside], name: str) -> float | None:
    """Returns the mean over domains, each counting alike."""
    values = [float(getattr(one, name)) for one in beyond.values()]
    return sum(values) / len(values) if values else None
