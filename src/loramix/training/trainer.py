"""A transformers.Trainer that knows domains: mixed sampling, routing loss, sums divided once, a log line per domain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from loramix.errors import ConfigError
from loramix.labels import IGNORED
from loramix.losses import AUXILIARY, Seen, layer_correct
from loramix.training.collapse import CollapseWatch
from loramix.training.guard import StepGuard, divergence
from loramix.training.keeper import StageKeeper, load_optimizer, load_weights, process_state, restore_random
from loramix.training.means import DomainMeans, StepMean
from loramix.training.settings import TrainingSettings
from loramix.training.smaller_batches import WHOLE, SmallerBatches, bound_of, real_tokens
from loramix.training.supervised_loss import SupervisedLoss
from loramix.training.tally import DomainTally
from loramix.tuner import LoramixConfig
from loramix.tuner.guide import ForwardGuide


class MixtureTrainer(Trainer):
    """Trains a model (its active loramix adapter, another PEFT adapter, or all of it) on examples with domains.

    The loss of a step is  sum of NLL / supervised tokens + sum over auxiliary losses of weight * mean,  with sums and
    means over all micro-batches of the step: accumulating 4 x 1 row gives the gradient of 1 x 4 rows. The exception are
    losses on a batch's statistics (load balance, localized balance, contrastive): they are taken in each micro-batch
    and weighted by its share of the step (docs/decisions/0006-losses-on-batch-statistics.md).

    Args:
        model: a PeftModel, or a base.
        settings: of the stage.
        domains: names, in the order of `domain_ids`; for the log.
        sampler: order of the examples, or None for transformers' own.
        auxiliary: auxiliary losses by name with their weights; a weight of 0 leaves a loss out.
        kinds: for losses that tell two kinds of data apart, the kind of each domain, 0 or 1.
        keeper: keeps checkpoints, if any are to be kept.
        prompt_states: what routers that read the base take in of each example's prompt, (N, I) by scope; None reads
            the prompts in each step.
        mean: what the language losses are divided by; a step's supervised tokens by default.
        say: shows a line to whoever watches.
        **kwargs: for `transformers.Trainer` (args, train_dataset, data_collator, callbacks, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainingSettings,
        domains: Sequence[str],
        sampler: Sampler[int] | None = None,
        auxiliary: Mapping[str, float] | None = None,
        kinds: Sequence[int] | None = None,
        keeper: StageKeeper | None = None,
        prompt_states: Mapping[str, Tensor] | None = None,
        mean: StepMean | DomainMeans | None = None,
        say: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("eval_dataset") is not None:
            raise ConfigError("MixtureTrainer measures nothing. Leave eval_dataset out; use loramix.evaluation.")
        super().__init__(model=model, **kwargs)
        self.settings = settings
        self.sampler = sampler
        self.auxiliary = {name: weight for name, weight in (auxiliary or {}).items() if weight > 0}
        self.kinds = torch.tensor(list(kinds) if kinds is not None else [0] * len(domains))
        adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
        inside: Any = model
        routed = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
        if (guide := ForwardGuide.on(routed)) is not None and guide.attached is not None:
            raise ConfigError("the losses are attached, and MixtureTrainer adds them itself. Call detach_losses first.")
        self._told = any(isinstance(config, LoramixConfig) for config in adapters.values())
        routers = [p.requires_grad for name, p in model.named_parameters() if ".loramix_router." in name]
        self._watches = self._told and (any(routers) or not routers)
        self.tally = DomainTally(domains)
        self._tokens_seen = torch.zeros((), dtype=torch.float64)
        self.keeper = keeper
        self.guard = StepGuard(inside.config.get_text_config().vocab_size)
        self.smaller, self.watch = SmallerBatches(bound_of(settings.tokens_at_once)), CollapseWatch()
        self.say = say
        self.seconds_before, self._began = 0.0, time.monotonic()
        self._tally_before = self.tally.copy()
        self._step_nll: Tensor = torch.zeros(())
        self.loss_is_scaled_for_ga = True
        """Read by Trainer: our loss is divided by the whole step's counts already."""
        self._step_tokens = self._step_rows = self._step_real = torch.ones(())
        self.language_loss = SupervisedLoss(model, settings.head_chunk)
        self.prompt_states = prompt_states
        self.mean = mean or StepMean()

    @property
    def tokens_seen(self) -> int:
        """Real tokens trained on so far, by all processes; reading it waits for the device."""
        return int(self._tokens_seen)

    def seconds(self) -> float:
        """Returns how long the stage has trained, what came before a resumption included."""
        return self.seconds_before + time.monotonic() - self._began

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two groups: experts, and routers at their own learning rate."""
        if getattr(self, "optimizer", None) is None:
            trained = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            routers = [p for n, p in trained if ".loramix_router." in n]
            experts = [p for n, p in trained if ".loramix_router." not in n]
            groups: list[dict[str, Any]] = [{"params": experts, "lr": self.settings.learning_rate}]
            if routers:
                groups.append({"params": routers, "lr": self.settings.router_learning_rate})
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options["weight_decay"] = self.settings.weight_decay
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collects the micro-batches of a step and counts, over all of them and all processes, what the losses are
        divided by."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.smaller.begin_step(batches)
        self._tally_before = self.tally.copy()
        self._step_nll = torch.zeros((), device=device)
        rows = sum(len(batch["domain_ids"]) for batch in batches)
        supervised = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]
        real = [real_tokens(batch) for batch in batches]
        counts = torch.stack(
            [torch.stack(supervised).sum(), torch.full_like(supervised[0], rows), torch.stack(real).sum()]
        ).to(device, torch.float32)
        self._step_tokens, self._step_rows, self._step_real = self.accelerator.reduce(counts, reduction="sum").unbind()
        self._tokens_seen = self._step_real.double() + self._tokens_seen
        self.mean.begin(batches, self._step_tokens)
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns this micro-batch's part of the step's loss."""
        unasked = {"labels", "places", *WHOLE} | (set() if self._told else {"domain_ids", "prompt_mask"})
        asked: dict[str, Any] = {k: v for k, v in inputs.items() if k not in unasked}
        if self.prompt_states:
            places_B = inputs["places"].cpu()
            asked["prompt_states"] = {scope: read_NI[places_B] for scope, read_NI in self.prompt_states.items()}
        nll_B, tokens_B = self.language_loss(model, asked, inputs)
        domain_ids_B = inputs["domain_ids"]
        self.tally.add(domain_ids_B, nll=nll_B, tokens=tokens_B)
        self._step_nll = self._step_nll + nll_B.detach().sum()
        loss = self.mean.of(nll_B, domain_ids_B)
        if self.auxiliary:
            loss = loss + self._auxiliary_loss(model, inputs)
        if self._watches and (self.state.global_step + 1) % self.args.logging_steps == 0:
            routed: Any = self.accelerator.unwrap_model(model)
            self.watch.look(routed.routings, domain_ids_B, len(self.tally.domains))
        # Data parallelism averages gradients over processes; the counts above are over all of them.
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _auxiliary_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Returns this micro-batch's part of the step's auxiliary losses."""
        domain_ids_B = inputs["domain_ids"]
        routed: Any = self.accelerator.unwrap_model(model)
        seen = Seen(
            routed.routings, routed.expert_outputs, domain_ids_B, self.kinds.to(domain_ids_B.device)[domain_ids_B]
        )
        shares = {
            "rows": len(domain_ids_B) / self._step_rows,
            "tokens": real_tokens(inputs) / self._step_real,
        }
        total = torch.zeros((), device=domain_ids_B.device)
        for name, weight in self.auxiliary.items():
            value = AUXILIARY[name].value(seen)
            self.tally.add_auxiliary(name, value)
            total = total + weight * value * shares[AUXILIARY[name].mean_over]
        if "routing_cross_entropy" in self.auxiliary:
            correct_LB = layer_correct(seen.routings, domain_ids_B)
            decided_B = torch.full_like(domain_ids_B, len(correct_LB), dtype=torch.float32)
            self.tally.add(domain_ids_B, correct=correct_LB.sum(dim=0), decided=decided_B)
        return total

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Learns a micro-batch; where memory runs out, its step again in smaller parts (not where other processes would
        have to do the same)."""

        def learn(part: dict[str, Tensor]) -> Tensor:
            return super(MixtureTrainer, self).training_step(model, part, num_items_in_batch)

        loss = learn(inputs) if self.accelerator.num_processes > 1 else self.smaller.learn(inputs, learn, self._undo)
        return self.mean.shown(torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss)))

    def _undo(self) -> None:
        """Takes back what the step has left so far."""
        self.model.zero_grad()
        self.tally, self._step_nll = self._tally_before.copy(), torch.zeros_like(self._step_nll)
        self.say(f"out of memory: micro-batches are learned in {self.smaller.parts} parts from now on")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the gradient's norm; None for a step that makes no sense, whose gradients are then gone, so that the
        optimizer does nothing."""
        norm = super()._get_grad_norm(model, grad_norm)
        nll = self.accelerator.reduce(self._step_nll, reduction="sum") / self._step_tokens
        why = self.guard.judge(float(nll), float(norm))
        if why is None:
            return norm
        model.zero_grad()
        self.say(f"step {self.state.global_step + 1} is left out: {why}")
        if self.guard.out_of_patience:
            self._go_back(f"the last of them step {self.state.global_step + 1} ({why})")
        return None

    def end_well(self) -> None:
        """Puts the last checkpoint's weights back if the last steps made no sense: the stage ends before patience does.

        Raises:
            Diverged: there is none, or it had been put back before.
        """
        if self.guard.left_out:
            self._go_back(f"the last {self.guard.left_out} of the stage")

    def _go_back(self, which: str) -> None:
        """Puts the last checkpoint's weights back, once; data and schedule go on.

        Raises:
            Diverged: there is none, or it did not help.
        """
        keeper, again = self.keeper, bool(self.guard.went_back)
        found = keeper.go_back(self) if keeper is not None and not again else None
        if found is None:
            rates = (self.settings.learning_rate, self.settings.router_learning_rate)
            raise divergence(self.guard, which, rates, keeper.store.folder if keeper is not None and again else None)
        self.guard.back()
        self.say(f"went back to the weights after step {found.step}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.keeper is not None:
            self.keeper.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: 16 bits are bfloat16."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(process_state(self, Path(checkpoint)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.accelerator.num_processes > 1:
            self.tally.join(partial(self.accelerator.reduce, reduction="sum"))
        routers = self.watch.numbers() if "loss" in logs else {}  # the last entry sums the stage up
        super().log({**logs, **self.tally.drain(), **routers}, start_time)
        if (warning := self.watch.verdict()) is not None:
            self.say(warning)
