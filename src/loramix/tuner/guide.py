"""Tells each forward of a model how to route, before its layers run.

One hook on the whole model serves every way in: PEFT, transformers' own `add_adapter`, Trainer, `generate`. It takes
our private arguments out of the call (`domain_ids`, `prompt_mask`, `decision`, `abstain`, and `prompt_states`, what the
routers take in where it is known beforehand), works out which tokens are
prompt, and settles the experts of the sequences that begin here. Sequences that go on (decode steps on a filled cache)
keep theirs: the cache was computed with those experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loramix.errors import ConfigError
from loramix.routing import Call, PromptRead, Routing, RoutingContext, copies_per_row
from loramix.segments import BORDERS
from loramix.tuner.abstaining import Calibrated, calibration_of, held_experts
from loramix.tuner.attached import AttachedLosses
from loramix.tuner.checkpointing import CheckpointGuard
from loramix.tuner.decisions import last_scope_needed
from loramix.tuner.masks import cached_tokens, prompt_tokens, prompt_width, real_tokens, segments_of
from loramix.tuner.mixture import Mixture, checked_ids
from loramix.tuner.persistence import TransformersLoad
from loramix.tuner.prompts import prompts_alone
from loramix.tuner.quantised import refuse_without_gradient

_NAME = "loramix_guide"


class ForwardGuide:
    """The hook and what it knows. One for each base model, whatever number of adapters is on it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.context = RoutingContext()
        self.checkpoints = CheckpointGuard(model, self.context)
        self.mixtures: dict[str, Mixture] = {}
        self.attached: AttachedLosses | None = None
        self._settled: Tensor | dict[str, Routing] | None = None
        self._reading = self._trains = False
        self._hooks: list[RemovableHandle] = []
        self._of_cache: WeakKeyDictionary[Any, dict[str, Routing]] = WeakKeyDictionary()

    @staticmethod
    def of(model: nn.Module) -> ForwardGuide:
        """Returns the guide of a base model; made and hooked up the first time."""
        if (found := ForwardGuide.on(model)) is not None:
            return found
        guide = ForwardGuide(model)
        setattr(model, _NAME, guide)
        guide._hooks = [
            model.register_forward_pre_hook(guide.before_forward, with_kwargs=True),
            model.register_forward_hook(guide.after_forward, with_kwargs=True),
        ]
        TransformersLoad(model).install()
        return guide

    @staticmethod
    def on(model: nn.Module) -> ForwardGuide | None:
        """Returns the guide of a base model, or None where no adapter of ours is on it."""
        found = getattr(model, _NAME, None)
        return found if isinstance(found, ForwardGuide) else None

    def leave(self) -> None:
        """Takes the hook and everything put on the model away; the base is as it was."""
        self.context.call = None
        for hook in self._hooks:
            hook.remove()
        for name in (_NAME, CheckpointGuard.replaces, TransformersLoad.replaces):
            self.model.__dict__.pop(name, None)

    def add(self, mixture: Mixture) -> None:
        """Takes in a new adapter."""
        self.mixtures[mixture.name] = mixture
        self.checkpoints.routes = self.checkpoints.routes or bool(mixture.doors)
        self.checkpoints.install()

    def active(self) -> Mixture | None:
        """Returns the adapter that answers now, or None (disabled, deleted, or another PEFT method is active)."""
        return next((mixture for mixture in self.mixtures.values() if mixture.active), None)

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Opens the call that the adapted layers will read. Registered as forward pre-hook of the base model."""
        if self._reading:
            return None
        domain_ids = kwargs.pop("domain_ids", None)
        prompt_mask = kwargs.pop("prompt_mask", None)
        decision = kwargs.pop("decision", None)
        abstain = kwargs.pop("abstain", None)
        read = kwargs.pop("prompt_states", {})
        mixture = self.active()
        if module.training and mixture is not None and not self._trains:
            refuse_without_gradient(module)
            self._trains = True
        if mixture is None or not mixture.doors:
            self.context.call = None
            return args, kwargs
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        mask_BT = real_tokens(kwargs.get("attention_mask"), inputs)
        call = Call(mask_BT=mask_BT, prompt_mask_BT=mask_BT, segments=segments_of(inputs, kwargs))
        self.context.call, rows = None, call.rows
        if mixture.settled_by != "prompt":
            self._tell_domains(call, domain_ids, mixture, inputs)
            self.context.call = call
            return args, kwargs
        call.prompt_mask_BT = prompt_tokens(prompt_mask, kwargs.get("labels"), mask_BT, call.segments)
        call.prompt_width = prompt_width(prompt_mask, call.prompt_mask_BT)
        if domain_ids is not None:
            call.labels_B = call.expert_ids_B = checked_ids(domain_ids, rows, mixture, inputs.device)
            call.pooled = {scope: states_BI.to(inputs.device) for scope, states_BI in read.items()}
            if module.training and mixture.reads_base and not read:
                self._read_base(inputs, kwargs, call, mixture.scopes[-1])
        elif isinstance(self._settled, Tensor):
            call.expert_ids_B = self._settled.repeat_interleave(copies_per_row(len(self._settled), rows))
        elif self._settled is not None:
            call.carried = self._settled
        elif cached_tokens(kwargs.get("past_key_values")) > 0:
            call.carried = self._carried(kwargs["past_key_values"])
        elif module.training:
            raise ConfigError(
                f"method {mixture.config.method} is taught by the domain label, but the forward in training mode got "
                f"no domain_ids. Pass domain_ids, an int64 tensor of {rows} positions among the experts "
                f"({', '.join(mixture.config.experts or [])}), or call model.eval()."
            )
        else:
            calibrated = calibration_of(mixture, abstain)
            self._settle_here(inputs, kwargs, call, decision or mixture.config.decision or "last", calibrated)
        self.context.call = call
        return args, kwargs

    def _tell_domains(self, call: Call, domain_ids: Tensor | None, mixture: Mixture, inputs: Tensor) -> None:
        """Tells the call of a method whose routers settle no sequence (by token, by constants, told the domain) what is
        known of its rows."""
        call.labels_B = None if domain_ids is None else domain_ids.to(inputs.device)
        if mixture.settled_by == "domain":
            rows = call.rows
            if domain_ids is not None:
                call.domain_ids_B = checked_ids(domain_ids, rows, mixture, inputs.device)
            elif isinstance(self._settled, Tensor):
                call.domain_ids_B = self._settled.repeat_interleave(copies_per_row(len(self._settled), rows))
            else:
                raise ConfigError(
                    f"method {mixture.config.method} weighs its experts by the domain's id, but the forward got no "
                    f"domain_ids. Pass domain_ids, an int64 tensor of {rows} positions among the domains "
                    f"({', '.join(mixture.labels)})."
                )

    def after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Remembers with which routing a key-value cache was filled, and hangs attached losses on the output of a
        training forward. Registered as forward hook of the base model."""
        cache = getattr(output, "past_key_values", None)
        call = self.context.call
        mixture = self.active()
        settles = mixture is not None and mixture.settled_by == "prompt"
        if settles and cache is not None and call is not None and call.routings and not self._reading:
            self._of_cache[cache] = dict(call.routings)
        learning = module.training and torch.is_grad_enabled() and not self._reading
        if self.attached is not None and learning and call is not None and call.routings:
            return self.attached.onto(output, call)
        return None

    def routings_of(self, cache: Any) -> dict[str, Routing] | None:
        """Returns the routing a key-value cache was filled with, by scope, or None for one that is new or unknown."""
        filled = cache is not None and cached_tokens(cache) > 0
        return self._of_cache.get(cache) if filled else None

    def _carried(self, cache: Any) -> dict[str, Routing]:
        routings = self.routings_of(cache)
        if routings is None:
            raise ConfigError(
                "the forward was given a filled key-value cache, but no routing of the prompt it was filled with. Run "
                "the prompt through this model first, or pass domain_ids."
            )
        return routings

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model knows no caches: they belong to the forwards of the original."""
        return {name: value for name, value in self.__dict__.items() if name != "_of_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._of_cache = WeakKeyDictionary()

    def _settle_here(
        self, inputs: Tensor, kwargs: Mapping[str, Any], call: Call, decision: str, calibrated: Calibrated | None
    ) -> None:
        """Settles the experts of sequences that begin with this forward."""
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ConfigError(
                "the prompt's mask has a form from which padding cannot be told (a static cache through transformers' "
                "own adapters, for example). Use the PeftModel's generate, or pass domain_ids."
            )
        mixture = self.active()
        if decision == "per_layer" and mixture is not None and not mixture.reads_base:
            return  # each router decides as the forward comes by; nothing is to be known beforehand
        read = self.read_prompts(inputs, kwargs, call, decision, calibrated)
        settled = held_experts(read, decision, None if calibrated is None else calibrated.verdict(call.pooled))
        if isinstance(settled, Tensor):
            call.expert_ids_B = settled
        else:
            call.carried = settled

    @torch.no_grad()
    def read_prompts(
        self,
        inputs: Tensor,
        kwargs: Mapping[str, Any],
        call: Call,
        decision: str,
        calibrated: Calibrated | None = None,
    ) -> dict[str, Routing]:
        """Runs the model up to the last router that the decision asks and returns what the routers said.

        A router that reads the base is asked after the base alone has read the prompt. One that reads the running model
        is asked on the way, and each layer follows its own router: in training every layer had the label's expert, so a
        router that is right gives the next ones what they saw then.

        Args:
            inputs: token ids (B, T) or embeddings (B, T, I).
            kwargs: of the forward being prepared; mask and positions are taken from it.
            call: its masks; pooled prompt states are put into it.
            decision: any but "pinned", which asks no router.
            calibrated: whose layer is read too, if it is asked.

        Raises:
            ConfigError: the decision is "pinned", or names a layer without router.
        """
        mixture = self.active()
        assert mixture is not None
        if decision == "pinned":
            raise ConfigError(
                'decision = "pinned", but no expert is named. Pass expert=NAME '
                f"(one of {', '.join(mixture.config.experts or [])})."
            )
        upto = last_scope_needed(decision, mixture.scopes)
        if calibrated is not None:
            upto = max(upto, calibrated.layer, key=mixture.scopes.index)
        if not mixture.reads_base:
            own = replace(call.snapshot(), stop_after=upto, pooled={})
            self._run(inputs, kwargs, own)
            return own.routings
        self._read_base(inputs, kwargs, call, upto)
        return {
            scope: mixture.doors[scope].router(mixture.name).decide(pooled_BI, call)
            for scope, pooled_BI in call.pooled.items()
        }

    @torch.no_grad()
    def _read_base(self, inputs: Tensor, kwargs: Mapping[str, Any], call: Call, upto: str) -> None:
        """Lets the base alone read the prompts, no further than they go, and keeps what the routers take in."""
        alone, cut, own = prompts_alone(inputs, kwargs, call, upto)
        self._run(alone, cut, own)
        call.pooled = own.pooled

    def _run(self, inputs: Tensor, kwargs: Mapping[str, Any], call: Call) -> None:
        """Runs the model in evaluation mode for the sake of what its routers record in `call`."""
        mask = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        if positions is None and isinstance(mask, Tensor) and mask.dim() == 2:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        reading: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        reading |= {name: kwargs[name] for name in BORDERS if name in kwargs}
        if positions is not None:
            reading["position_ids"] = positions
        reading["inputs_embeds" if inputs.is_floating_point() else "input_ids"] = inputs
        outer, training = self.context.call, [module for module in self.model.modules() if module.training]
        self.context.call, self._reading = call, True
        self.model.eval()
        try:
            self.model(**reading)
        except PromptRead:
            pass
        finally:
            self.context.call, self._reading = outer, False
            for module in training:
                module.training = True

    @contextmanager
    def settled(self, experts: Tensor | dict[str, Routing]) -> Iterator[None]:
        """Holds the experts of all rows for the forwards inside: ids (B,), or one routing for each scope."""
        before, self._settled = self._settled, experts
        try:
            yield
        finally:
            self._settled = before
