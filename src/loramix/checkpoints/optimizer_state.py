"""The state of an optimizer by the names of parameters, as tensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors, under "parameter|what", and the rest: numbers likewise, and the parameters of each group.
    Settings (learning rate, decay) are not part of it.

    Args:
        optimizer: whose state.
        names: of its parameters.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for what, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}|{what}"] = value.detach().contiguous()
            else:
                numbers[f"{names[parameter]}|{what}"] = value
    parameters = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    return tensors, {"parameters": parameters, "numbers": numbers}


def set_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
) -> list[str]:
    """Puts a state back and returns what does not fit; then nothing was changed.

    Args:
        optimizer: made as the one that was saved.
        names: of its parameters.
        tensors, rest: what `optimizer_state` returned.
    """
    now = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if now != rest["parameters"]:
        had, has = ({name for group in one for name in group} for one in (rest["parameters"], now))
        return [f"the optimizer's parameters: {len(had - has)} missing, {len(has - had)} more, or in another order"]
    position = {name: number for number, name in enumerate(name for group in now for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        name, _, what = key.rpartition("|")
        state.setdefault(position[name], {})[what] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return []
