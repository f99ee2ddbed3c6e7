"""A transformers.Trainer that knows domains: mixed sampling, routing loss, sums divided once, a log line per domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from loramix.errors import ConfigError
from loramix.labels import IGNORED
from loramix.losses import AUXILIARY, Seen, layer_correct, next_token_nll
from loramix.models.head import head_can_choose, logits_at
from loramix.training.settings import TrainingSettings
from loramix.training.tally import DomainTally
from loramix.tuner import LoramixConfig
from loramix.tuner.guide import ForwardGuide


def training_arguments(
    settings: TrainingSettings, output_dir: str, optim: str = "adamw_torch_fused"
) -> TrainingArguments:
    """Returns transformers' arguments for our settings; saving and reporting are ours, so theirs are off."""
    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False, **settings.activation_checkpointing_kwargs},
        dataloader_num_workers=settings.dataloader_num_workers,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        optim=optim,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # Several GPUs in one process would mean nn.DataParallel, whose threads share one routing; torchrun is the way.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


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
        self.tally = DomainTally(domains)
        self._tokens_seen = torch.zeros((), dtype=torch.float64)
        self.loss_is_scaled_for_ga = True
        """Read by Trainer: our loss is divided by the whole step's counts already."""
        self._step_tokens = self._step_rows = self._step_real = torch.ones(())
        self._head_can_choose = head_can_choose(model)

    @property
    def tokens_seen(self) -> int:
        """Real tokens trained on so far by this process; reading it waits for the device."""
        return int(self._tokens_seen)

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
        rows = sum(len(batch["labels"]) for batch in batches)
        supervised = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]
        real = [batch["attention_mask"].sum() for batch in batches]
        counts = torch.stack(
            [torch.stack(supervised).sum(), torch.full_like(supervised[0], rows), torch.stack(real).sum()]
        ).to(device, torch.float32)
        self._tokens_seen = counts[2].double() + self._tokens_seen
        self._step_tokens, self._step_rows, self._step_real = self.accelerator.reduce(counts, reduction="sum").unbind()
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns this micro-batch's part of the step's loss."""
        labels_BT = inputs["labels"]
        unasked = {"labels", "positions"} if self._told else {"labels", "positions", "domain_ids", "prompt_mask"}
        asked = {k: v for k, v in inputs.items() if k not in unasked}
        positions_P = inputs["positions"]
        logits_BPV = logits_at(model, positions_P, can_choose=self._head_can_choose, **asked)
        nll_BP, supervised_BP = next_token_nll(logits_BPV, labels_BT, positions_P)
        domain_ids_B = inputs["domain_ids"]
        self.tally.add(domain_ids_B, nll=nll_BP.sum(dim=1), tokens=supervised_BP.sum(dim=1))
        loss = nll_BP.sum() / self._step_tokens
        if self.auxiliary:
            loss = loss + self._auxiliary_loss(model, inputs)
        # Data parallelism averages gradients over processes; the counts above are over all of them.
        loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits_BPV}) if return_outputs else loss

    def _auxiliary_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Returns this micro-batch's part of the step's auxiliary losses."""
        domain_ids_B = inputs["domain_ids"]
        routed: Any = self.accelerator.unwrap_model(model)
        seen = Seen(
            routed.routings, routed.expert_outputs, domain_ids_B, self.kinds.to(domain_ids_B.device)[domain_ids_B]
        )
        shares = {
            "rows": len(domain_ids_B) / self._step_rows,
            "tokens": inputs["attention_mask"].sum() / self._step_real,
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self.tally.drain()}, start_time)
