"""Nothing in a step looks at a value on the host: on an accelerator each look would make the step wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from loramix import LoramixConfig
from loramix.data.collation import Collator, Example
from loramix.data.prompts import Encoded
from loramix.methods import METHODS
from loramix.training.arguments import training_arguments
from loramix.training.settings import TrainingSettings
from loramix.training.trainer import MixtureTrainer
from tests import tiny

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")


class _Looks(TorchDispatchMode):
    """Counts operations whose result or shape needs a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in LOOKS or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def _looks(model: torch.nn.Module, losses: dict[str, float], batch: dict[str, torch.Tensor]) -> Counter[str]:
    settings = TrainingSettings(max_steps=1)
    trainer = MixtureTrainer(
        model.train(),
        settings=settings,
        domains=tiny.EXPERTS,
        auxiliary=losses,
        args=training_arguments(settings, "unused"),
        train_dataset=[batch],
    )
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.compute_loss(model, batch)  # the head is looked at once, in the first step
    with _Looks() as looks:
        batches, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.compute_loss(model, batches[0]).backward()
    return looks.seen


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trains and method.router])
@pytest.mark.parametrize("backend", ["auto", "grouped"])
def test_a_training_step_waits_for_nothing(name: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    # labels are checked on a CPU only; on an accelerator the gather itself complains (tuner/mixture.py)
    monkeypatch.setattr("loramix.tuner.guide.checked_ids", lambda ids, *_: ids)
    method = METHODS[name]
    examples = [Example(Encoded(list(range(3, 13)), [i > 4 for i in range(10)], 5), row) for row in range(3)]
    batch = Collator(tiny.PAD)(examples)
    settings: dict[str, Any] = {"method": name, "r": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    if method.expert_count == "one per domain":
        settings["experts"] = tiny.EXPERTS
    if method.router.settled_by == "domain":
        settings["domains"] = tiny.EXPERTS
    if backend == "grouped" and method.router.level == "token":
        settings["backend"] = "grouped"
    if method.defaults.get("allocation"):
        settings["num_experts"] = 4
    base = tiny.llama()
    embeddings = base.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    wanted = _looks(base, {}, batch)  # transformers looks at the mask once a forward
    if method.router.settled_by == "prompt":
        wanted = Counter({name: 2 * count for name, count in wanted.items()})  # the base reads the prompts first
    assert _looks(get_peft_model(base, LoramixConfig(**settings)), dict(method.losses), batch) == wanted
