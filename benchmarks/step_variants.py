"""What `step_cost.py` measures: which variants there are, how each is built on the one base, and what its step is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peers import FORMS, FULL_WIDTH, Shape, forget, put_in, routings, shared_copy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from loramix import METHODS, LoramixConfig
from loramix.labels import IGNORED
from loramix.losses import AUXILIARY, Seen, supervised_positions
from loramix.models.head import logits_at

TARGETS: dict[str, tuple[str, ...]] = {
    "q,v": ("q_proj", "v_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
BASELINE = "PEFT LoRA"

MEASURED = (
    "lora",
    "moa",
    "mosld",
    "mosl",
    "mosld-b",
    "mola",
    "molora",
    "sira",
    "hydralora",
    "loramoe",
    "moelora-contrastive",
    "moelora-task",
    "mixlora",
    "llava-mole",
    "mole",
    "arrow",
)
"""Measured by default. Of the others moe-lora and moe-lora-naive take MoLA's step (without its balance loss) and may be
asked for; lorahub takes no gradient step; full and prefix have no experts."""

MAY_BE_MEASURED = tuple(name for name, method in METHODS.items() if method.tuner == "loramix" and name != "lorahub")

NEEDS_FFN = ("mixlora", "llava-mole")

NOTES = {
    "moa": "the base reads the prompt once more, without experts, for the routers",
    "mosld": "with its dropout of 0.1 on the shared matrix",
    "mosld-b": "with its dropout of 0.1 on the shared matrix",
    "arrow": "trains nothing itself (each expert's own step is lora's); experts unfrozen so that there is a step",
    "mole": "experts frozen; the gates alone train",
    "llava-mole": "top 1; plain LoRA on attention",
    "mixlora": "plain LoRA on attention",
}


@dataclass(frozen=True)
class Spec:
    """One variant: a method in a form, at a number of experts."""

    method: str
    form: str
    targets: str
    experts: int
    rank: int
    reads: str | None = None
    note: str | None = None
    backend: str = "auto"

    @property
    def top_k(self) -> int:
        """Returns how many experts take part for a token: K, all of a dense mixture, one of MoA's."""
        router = METHODS[self.method].router if self.form != BASELINE else None
        if router is None:
            return 1
        return int(getattr(router, "top_k", 1 if router.settled_by == "prompt" else self.experts))

    @property
    def leaves(self) -> tuple[str, ...]:
        return TARGETS[self.targets]

    @property
    def label(self) -> str:
        reads = f" (reads {self.reads})" if self.reads else ""
        return f"{self.method}{reads} / {self.form} / {self.targets} / E={self.experts}"

    def gigabytes(self, base: nn.Module, tokens: int) -> float:
        """Returns how much is kept for the backward pass by forms that keep every expert's output; 0 for others."""
        if self.form not in FULL_WIDTH:
            return 0.0
        linears = [m for name, m in base.named_modules() if name.rpartition(".")[2] in self.leaves]
        return 4 * tokens * self.experts * sum(linear.out_features for linear in linears) / 2**30


def specs(
    methods: Sequence[str], targets: str, experts: int, rank: int, first: bool, backend: str = "auto"
) -> Iterator[Spec]:
    """Yields the variants of one number of experts; LoRA itself, which has one, only in the first such group."""
    for method in methods:
        if (method in NEEDS_FFN and targets == "q,v") or (method == "lora" and not first):
            continue
        if method == "moelora-task" and rank % experts:
            continue
        count = 1 if method == "lora" else experts
        yield Spec(method, "loramix", targets, count, rank, note=NOTES.get(method), backend=backend)
        if method == "moa":
            note = "router reads the running model: no second reading of the prompt"
            yield Spec(method, "loramix", targets, experts, rank, "experts", note, backend)
        for peers_method, form in FORMS:
            if peers_method == method:
                yield Spec(method, form, targets, experts, rank, note=NOTES.get(method))


@dataclass
class Batch:
    """Random tokens; the first half of each row is prompt."""

    told: dict[str, Tensor]
    """What every model is told."""
    asked: dict[str, Tensor]
    """What loramix's models are told beside."""
    positions_P: Tensor
    targets_N: Tensor

    @classmethod
    def random(cls, rows: int, length: int, vocabulary: int, experts: int) -> Batch:
        """Returns a batch as the collator gives it: masks, labels' positions, a domain for each row."""
        ids_BT = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
        labels_BT = ids_BT.clone()
        labels_BT[:, : length // 2] = IGNORED
        positions_P = supervised_positions(labels_BT)
        prompt_mask = torch.ones(rows, length // 2, dtype=torch.bool)
        return cls(
            told={"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
            asked={"prompt_mask": prompt_mask, "domain_ids": torch.arange(rows) % experts},
            positions_P=positions_P,
            targets_N=labels_BT[:, positions_P + 1].flatten(),
        )


@dataclass
class Variant:
    """A model with a method's experts in it, on the shared base, and its optimizer."""

    spec: Spec
    model: Any
    optimizer: torch.optim.Optimizer
    batch: Batch

    @property
    def is_ours(self) -> bool:
        return self.spec.form == "loramix"

    def logits(self) -> Tensor:
        """Returns the logits where there are labels, (B, P, V)."""
        inputs = self.batch.told | self.batch.asked if self.is_ours else self.batch.told
        return logits_at(self.model, self.batch.positions_P, can_choose=True, **inputs)

    def loss(self) -> Tensor:
        """Returns the loss as the trainer has it: language model, and the method's own losses at their weights."""
        batch = self.batch
        total = F.cross_entropy(self.logits().flatten(0, 1).float(), batch.targets_N)
        losses = {} if self.spec.form == BASELINE else METHODS[self.spec.method].losses
        domain_ids_B = batch.asked["domain_ids"]
        for name, weight in losses.items():
            if weight == 0:
                continue
            seen = Seen(
                routings=self.model.routings if self.is_ours else routings(self.model),
                outputs=self.model.expert_outputs if self.is_ours else {},
                domain_ids_B=domain_ids_B,
                kinds_B=domain_ids_B % 2,
            )
            total = total + weight * AUXILIARY[name].value(seen)
        return total

    def step(self) -> float:
        """Takes one training step and returns its loss."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._forget()
        return loss.item()

    def make_optimizer_state(self) -> None:
        """Takes an optimizer step on gradients of zero, so that no later step has to make room for Adam's state."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _forget(self) -> None:
        """Drops the routings of the last forward, which would count as there before the next step."""
        if self.is_ours:
            self.model.base_model.guide.context.call = None
        else:
            forget(self.model)


def our_model(base: nn.Module, spec: Spec, **settings: Any) -> Any:
    """Returns loramix's model of a variant, in training mode, on the base's own weights."""
    method = METHODS[spec.method]
    told = method.router is not None and method.router.settled_by == "domain"
    config = LoramixConfig(
        method=spec.method,
        num_experts=spec.experts,
        domains=[f"domain_{e}" for e in range(spec.experts)] if told else None,
        r=spec.rank,
        lora_alpha=2 * spec.rank,
        lora_dropout=0.0,
        target_modules=list(spec.leaves),
        backend=spec.backend,
        router={"reads": spec.reads} if spec.reads else None,
        **settings,
    )
    model = get_peft_model(shared_copy(base), config)
    if method.router is not None and method.router.kind == "prototype":
        for name, module in model.named_modules():
            if name.endswith("loramix_bank.default"):
                module.requires_grad_(True)
            elif name.endswith("loramix_router.default"):
                module.prototypes_EI.copy_(F.normalize(torch.randn_like(module.prototypes_EI), dim=1))
    return model.train()


def peers_model(base: nn.Module, spec: Spec) -> Any:
    """Returns a peer's model of a variant, in training mode, on the base's own weights."""
    shape = Shape(spec.experts, spec.rank, spec.top_k, scaling=2.0)
    return put_in(shared_copy(base), spec.method, spec.form, spec.leaves, shape).train()


def built(spec: Spec, base: nn.Module, rows: int, length: int) -> Variant:
    """Builds one variant."""
    torch.manual_seed(0)
    if spec.form == BASELINE:
        config = LoraConfig(
            r=spec.rank, lora_alpha=2 * spec.rank, lora_dropout=0.0, target_modules=list(spec.leaves), bias="none"
        )
        model = get_peft_model(shared_copy(base), config).train()
    else:
        make: Callable[[nn.Module, Spec], Any] = our_model if spec.form == "loramix" else peers_model
        model = make(base, spec)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    vocabulary = base.get_input_embeddings().num_embeddings
    return Variant(spec, model, optimizer, Batch.random(rows, length, vocabulary, spec.experts))
