"""Which few layers stand for all of a base, and the adapter on them that the whole base would get."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model

from loramix.experts import experts_per_layer
from loramix.models.few_layers import few_layers, layer_stack
from loramix.tuner.fit import matched_modules


class FewLayers:
    """Makes models with few of a base's layers.

    Layers differ in their experts, in whether they have any, and in their size (some have a mixture of the base's own).
    Those that are kept are spread over all kinds of them; the kind with the most experts is always there.

    Args:
        skeleton: the whole base without weights; not changed.
        dtype: of its weights.
        config: the LoramixConfig of the whole base's adapter; not changed.
        taught: whether routers learn.

    Raises:
        ModelError: its layers cannot be told, or the adapter does not fit the base.
    """

    def __init__(self, skeleton: Any, dtype: torch.dtype, config: Any, taught: bool) -> None:
        self.skeleton, self.dtype, self.config, self.taught = skeleton, dtype, config, taught
        self._stack = layer_stack(skeleton)
        stack = skeleton.get_submodule(self._stack)
        self.layers = len(stack)
        self._matched = matched_modules(skeleton, copy.copy(config))
        counts = experts_per_layer(config.allocation, config.num_experts, self.layers)
        adapted = {self._layer_of(name) for name in self._matched}
        self.experts = [counts[layer] if layer in adapted else 0 for layer in range(self.layers)]
        self._sizes = [sum(one.numel() for one in layer.parameters()) for layer in stack]

    def chosen(self, number: int) -> list[int]:
        """Returns so many layers, ascending."""
        by_kind = sorted(range(self.layers), key=lambda layer: (self.experts[layer], self._sizes[layer], layer))
        return sorted(by_kind[(place + 1) * self.layers // number - 1] for place in range(number))

    def model(self, number: int, device: torch.device | str) -> Any:
        """Returns a PeftModel of so many layers in training mode, with random weights; "meta" for shapes alone."""
        chosen = self.chosen(number)
        base = few_layers(self.skeleton, chosen, self.dtype, device)
        return without_taught_routers(get_peft_model(base, self._config(chosen)).train(), self.taught)

    def _config(self, chosen: list[int]) -> Any:
        config = copy.deepcopy(self.config)
        if config.allocation not in (None, "uniform"):
            config.allocation = [max(1, self.experts[layer]) for layer in chosen]
        # Layers have other numbers now, and patterns may go by numbers: the modules are named one by one.
        config.target_modules = self._targets(chosen)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        if str(config.decision).startswith("layer:"):  # that layer may be missing, and training does not ask
            config.decision = "last"
        return config

    def _targets(self, chosen: list[int]) -> set[str]:
        """Returns the adapted modules that are left, by their new names."""
        targets = set()
        for name in self._matched:
            layer = self._layer_of(name)
            if layer is None:
                targets.add(name)
            elif layer in chosen:
                before = f"{self._stack}.{layer}."
                targets.add(f"{self._stack}.{chosen.index(layer)}.{name.removeprefix(before)}")
        return targets

    def _layer_of(self, name: str) -> int | None:
        """Returns the number of the layer that a module is in; None for one outside."""
        before = f"{self._stack}."
        return int(name.removeprefix(before).partition(".")[0]) if name.startswith(before) else None


def without_taught_routers(model: Any, taught: bool) -> Any:
    """Returns a model whose routers learn nothing, unless they are taught."""
    for name, parameter in model.named_parameters():
        if not taught and ".loramix_router." in name:
            parameter.requires_grad_(False)
    return model
