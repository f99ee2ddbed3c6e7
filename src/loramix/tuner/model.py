"""LoramixModel: puts the experts and routers of a method into a base, and answers with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from loramix.errors import ConfigError, Problems
from loramix.routing import ExpertOutputs, Routing
from loramix.tuner.adapted import AdaptedModule, adapted_modules, as_table
from loramix.tuner.config import LoramixConfig
from loramix.tuner.fit import matched_modules
from loramix.tuner.guide import ForwardGuide
from loramix.tuner.layer import LoramixLinear
from loramix.tuner.masks import generation_mask
from loramix.tuner.mixture import Mixture, checked_ids
from loramix.tuner.persistence import check_tensors
from loramix.tuner.places import places
from loramix.tuner.registration import PREFIX
from loramix.tuner.routes import Route, batches
from loramix.tuner.settling import Wish, settle_prompts


class LoramixModel(BaseTuner):
    """A base with a mixture of LoRA experts in it; what `get_peft_model` puts inside a PeftModel.

    Beside what PEFT gives every method it has `route`, `generate` with `expert=` and `decision=`, `routings` (what the
    routers of the last forward said) and `adapted_modules`.
    """

    prefix = PREFIX
    tuner_layer_cls = LoramixLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    if TYPE_CHECKING:  # what BaseTuner gives; PEFT has no types
        model: Any
        peft_config: dict[str, Any]
        active_adapters: list[str]

    # ---- PEFT's door: what is put where -------------------------------------------------------------------------

    def _prepare_model(self, peft_config: LoramixConfig, model: nn.Module) -> None:
        """Finds all modules to adapt and their places before any is replaced, so that all problems come at once."""
        self._places = places(model, peft_config, matched_modules(model, peft_config))

    def _create_and_replace(
        self,
        peft_config: LoramixConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self._places[current_key]
        if isinstance(target, LoramixLinear):
            target.update_layer(adapter_name, peft_config, place)
            return
        new = LoramixLinear(target, ForwardGuide.of(self.model).context, current_key)
        new._active_adapter = adapter_name
        new.update_layer(adapter_name, peft_config, place)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    @property
    def guide(self) -> ForwardGuide:
        return ForwardGuide.of(self.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter and makes it known to the guide. All of PEFT's and transformers' ways of adding come here."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = {name: model.get_submodule(name) for name in self._places}
        doors = {place.scope: layers[name] for name, place in self._places.items() if place.is_door and place.scope}
        mixture = Mixture(adapter_name, self.peft_config[adapter_name], next(iter(layers.values())), doors)  # type: ignore[arg-type]
        self.guide.add(mixture)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.guide.mixtures.pop(adapter_name, None)

    def _check_merge_allowed(self) -> None:
        """Looks at all layers before the first is changed: half a merge would be neither the one nor the other."""
        super()._check_merge_allowed()
        problems = Problems("the merge")
        layers = [module for module in self.model.modules() if isinstance(module, LoramixLinear)]
        adapters = [one for one in self.active_adapters if any(one in layer.loramix_bank for layer in layers)]
        for adapter in adapters:
            found = [layer.merge_problem(adapter) for layer in layers if adapter in layer.loramix_bank]
            for problem in dict.fromkeys(one for one in found if one):
                problems.add(problem)
        problems.raise_as(ConfigError)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        self.guide.leave()
        return base

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT's, which looks at the last name but one; a router's parts have names one deeper."""
        shorter = re.sub(rf"(\.{PREFIX}(?:bank|router))\.{re.escape(adapter_name)}\.", r"\1.", key)
        return shorter if shorter != key else str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Checks the whole file before a single tensor is set; then lets PEFT rename."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        wanted = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if any(f".{PREFIX}{part}.{adapter_name}." in name for part in ("bank", "router"))
        }
        found = {name: tensor for name, tensor in remapped.items() if "modules_to_save" not in name}
        check_tensors(wanted, found, f"the tensors of adapter {adapter_name!r}")
        return remapped

    # ---- answering -----------------------------------------------------------------------------------------------

    def _mixture(self) -> Mixture:
        mixture = self.guide.active()
        if mixture is None or not mixture.doors:
            raise ConfigError(
                "there is nothing to route: no adapter with routers is active. Load a routed method (moa, for example) "
                "or enable it with model.set_adapter(name)."
            )
        if mixture.settled_by != "prompt":
            raise ConfigError(
                f"method {mixture.config.method} settles no expert for a prompt. Call generate without expert and "
                "decision (with domain_ids for a method that is told the domain); model.routings tells more."
            )
        return mixture

    @property
    def experts(self) -> list[str]:
        """Names of the active adapter's experts, in the order of `domain_ids`."""
        mixture = self.guide.active()
        return list(mixture.config.experts or []) if mixture is not None else []

    @property
    def routings(self) -> dict[str, Routing]:
        """What each router decided in the last forward, by layer name, in forward order."""
        call = self.guide.context.call
        return dict(call.routings) if call is not None else {}

    @property
    def expert_outputs(self) -> dict[str, ExpertOutputs]:
        """A sample of what experts put out in the last training forward, by module; only where a loss compares them."""
        call = self.guide.context.call
        return dict(call.outputs) if call is not None else {}

    def route(
        self,
        prompts: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decision: str | None = None,
        expert: str | Sequence[str] | None = None,
        abstain: bool | None = None,
        allowed: Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> list[Route]:
        """Returns which expert answers each prompt, and why.

        The prompt is read once, no deeper than the decision needs.

        Args:
            prompts: texts, put into the base's chat template as one user turn each; needs `tokenizer`.
            tokenizer: of the base.
            input_ids: token ids (B, T) instead of texts.
            attention_mask: (B, T), 1 for real tokens; all are real when it is left out.
            decision: "last", "vote", "per_layer", "layer:k" or "pinned"; the adapter's own by default.
            expert: the expert to pin, or one for each prompt; "base" for none.
            abstain: send prompts that no expert fits to the base; by default if the adapter is calibrated for it.
            allowed: the experts to choose among; the others get probability 0. All by default.
            batch_size: prompts read together.

        Raises:
            ConfigError: nothing to route, an unknown expert or decision, texts without a tokenizer, no calibration.
        """
        self._mixture()
        routes: list[Route] = []
        for ids_BT, mask_BT in batches(prompts, tokenizer, input_ids, attention_mask, batch_size):
            start, rows = len(routes), len(ids_BT)
            named = expert if expert is None or isinstance(expert, str) else expert[start : start + rows]
            wish = Wish(decision, named, abstain, allowed)
            kwargs = {"attention_mask": mask_BT.to(self.model.device)}
            routes += settle_prompts(self.guide, ids_BT.to(self.model.device), kwargs, wish)[0]
        return routes

    def generate(
        self,
        *args: Any,
        expert: str | Sequence[str] | None = None,
        decision: str | None = None,
        abstain: bool | None = None,
        domain_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as transformers does, with the experts of each row settled once, from its prompt, and then held.

        Beams and returned sequences follow their prompt; rows of one batch may have different experts.

        Args:
            *args, **kwargs: for `GenerationMixin.generate`.
            expert: pins one expert, or one for each row; "base" for none.
            decision: how the experts are settled; the adapter's own by default.
            abstain: let the base answer prompts that no expert fits; by default if the adapter is calibrated for it.
            domain_ids: the same as `expert`, as positions, int64 (B,).
        """
        mixture = self.guide.active()
        given = [args[0] if args else None, *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
        inputs = next((one for one in given if one is not None), None)
        if domain_ids is not None and (expert is not None or decision is not None or abstain):
            raise ConfigError(
                "generate was given domain_ids and expert, decision or abstain. They contradict each other: pass one."
            )
        if mixture is not None and mixture.settled_by == "domain" and domain_ids is not None and inputs is not None:
            with self.guide.settled(checked_ids(domain_ids, len(inputs), mixture, inputs.device)):
                return self.model.generate(*args, **kwargs)
        if mixture is None or mixture.settled_by != "prompt" or inputs is None:
            if expert is not None or decision is not None or abstain:
                self._mixture()
                raise ConfigError("generate was given an expert but no prompt. Pass input_ids or inputs_embeds.")
            return self.model.generate(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        plain = expert is None and decision is None and abstain is None
        if domain_ids is not None:
            held: Tensor | dict[str, Routing] = checked_ids(domain_ids, len(inputs), mixture, inputs.device)
        elif plain and (known := self.guide.routings_of(cache)) is not None:
            held = known
        else:
            mask = generation_mask(self.model, inputs, kwargs)
            asked = {"attention_mask": None if mask is None else mask.to(self.model.device)}
            wish = Wish(decision, expert, abstain)
            held = settle_prompts(self.guide, inputs.to(self.model.device), asked, wish)[1]
        with self.guide.settled(held):
            return self.model.generate(*args, **kwargs)

    # ---- looking -------------------------------------------------------------------------------------------------

    def adapted_modules(self) -> list[AdaptedModule]:
        """Returns one row for each module the active adapter is on."""
        return adapted_modules(self.model)

    def adapted_modules_table(self) -> str:
        """Returns the adapted modules as a text table, for printing."""
        return as_table(self.adapted_modules())
