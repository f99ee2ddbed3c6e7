"""Which few layers stand for all of a base, and the adapter on them that the whole base would get."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model

from loramix.experts import experts_per_layer
from loramix.models import load_few_layers
from loramix.settings import Experiment


class FewLayers:
    """Makes models with few of a base's layers.

    Layers differ in their experts, and in whether they have any. Those that are kept are spread over all kinds of
    them; the kind with the most experts is always there.

    Args:
        experiment: names the base and its type.
        config: the LoramixConfig of the whole base's adapter; not changed.
        layers: of the whole base.
        taught: whether routers learn.
    """

    def __init__(self, experiment: Experiment, config: Any, layers: int, taught: bool) -> None:
        self.experiment, self.config, self.layers, self.taught = experiment, config, layers, taught
        counts = experts_per_layer(config.allocation, config.num_experts, layers)
        given = config.layers_to_transform
        adapted = set(range(layers)) if given is None else {given} if isinstance(given, int) else set(given)
        self.experts = [counts[layer] if layer in adapted else 0 for layer in range(layers)]

    def chosen(self, number: int) -> list[int]:
        """Returns so many layers, ascending."""
        by_experts = sorted(range(self.layers), key=lambda layer: (self.experts[layer], layer))
        return sorted(by_experts[(place + 1) * self.layers // number - 1] for place in range(number))

    def model(self, number: int, device: torch.device | str) -> Any:
        """Returns a PeftModel of so many layers in training mode, with random weights; "meta" for shapes alone."""
        chosen = self.chosen(number)
        base = load_few_layers(self.experiment.model_name_or_path, chosen, self.experiment.dtype, device)
        return without_taught_routers(get_peft_model(base, self._config(chosen)).train(), self.taught)

    def _config(self, chosen: list[int]) -> Any:
        config = copy.deepcopy(self.config)
        if config.allocation not in (None, "uniform"):
            config.allocation = [max(1, self.experts[layer]) for layer in chosen]
        if config.layers_to_transform is not None:
            config.layers_to_transform = [place for place, layer in enumerate(chosen) if self.experts[layer]]
        if str(config.decision).startswith("layer:"):  # that layer may be missing, and training does not ask
            config.decision = "last"
        return config


def without_taught_routers(model: Any, taught: bool) -> Any:
    """Returns a model whose routers learn nothing, unless they are taught."""
    for name, parameter in model.named_parameters():
        if not taught and ".loramix_router." in name:
            parameter.requires_grad_(False)
    return model
