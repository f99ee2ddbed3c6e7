"""What `train_speed.py` measures: the work that all sides do, and how each of them trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peers import Shape, put_in, shared_copy
from peft import LoraConfig, get_peft_model
from rich.console import Console
from step_variants import TARGETS
from training_loops import Loop, Watch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from loramix import LoramixConfig, load_base
from loramix.corpus import encode_all
from loramix.data.collation import Example
from loramix.data.demo import demo_data
from loramix.experiment import build
from loramix.labels import IGNORED
from loramix.methods import METHODS
from loramix.models import load_tokenizer
from loramix.training.settings import TrainingSettings
from loramix.training.stages import train_stage
from loramix.training.trainer import MixtureTrainer

OURS = ("lora", "moa", "mosld", "mola", "mixlora")
SIDES = ("stock", "stock-by-length", "trl-packing", *OURS, "loop")
PACKED_LENGTH = 1024
RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """What every side learns, and how: `bf16` is autocast over a base in bfloat16, `dropout` the adapters' on their
    input."""

    base: Any
    tokenizer: Any
    examples: dict[str, list[Example]]
    batch: int
    bf16: bool
    dropout: float

    @property
    def rows(self) -> list[Example]:
        """All examples, domains in turn."""
        return [one for some in zip(*self.examples.values(), strict=False) for one in some]

    @property
    def supervised(self) -> int:
        return sum(one.supervised_tokens for one in self.rows)


def prepared(rows: int, *, max_length: int = 512, batch: int = 8, bf16: bool = False, dropout: float = 0.0) -> Work:
    """Returns base and data: each of the demo's four domains dealt out to two labels, so that there are eight.

    Args:
        rows: of each label.
        max_length: tokens of a row at most.
        batch: rows a step.
        bf16: the base in bfloat16, and training in autocast.
        dropout: of the adapters, on their input.
    """
    domains = {name: str(path) for name, path in demo_data().items()}
    content = {
        "method": "lora",
        "output_dir": "unused",
        "data": {"domains": domains, "max_length": max_length, "split_in": dict.fromkeys(domains, 2)},
    }
    tokenizer = load_tokenizer()
    data = encode_all(build(content).experiment, tokenizer)
    few = {name: examples[:rows] for name, examples in data.train.items()}
    return Work(load_base(dtype="bfloat16" if bf16 else "float32"), tokenizer, few, batch, bf16, dropout)


def trained(run: str) -> Callable[[Work, str, Path, Loop], None]:
    """Returns what trains a side; the loop's runs are named with the rows that they take at once, `loop-2`."""
    if run.startswith("loop-"):
        return _peers
    return {"stock": _stock, "stock-by-length": _stock, "trl-packing": _trl}.get(run, _ours)


def _peft_lora(work: Work) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=work.dropout, target_modules=list(TARGETS["all-linear"]))
    return get_peft_model(shared_copy(work.base), config)


def _dataset(rows: Sequence[Example]) -> Dataset:
    labels = [
        [token if wanted else IGNORED for token, wanted in zip(e.encoded.input_ids, e.encoded.supervised, strict=True)]
        for e in rows
    ]
    return Dataset.from_dict({"input_ids": [list(e.encoded.input_ids) for e in rows], "labels": labels})


def _stock(work: Work, run: str, scratch: Path, loop: Loop) -> None:
    by_length = run == "stock-by-length"
    arguments = TrainingArguments(
        **_arguments(work, scratch),
        per_device_train_batch_size=work.batch,
        train_sampling_strategy="group_by_length" if by_length else "random",
    )
    _by_trainer(_peft_lora(work), arguments, work, loop)


def _peers(work: Work, run: str, scratch: Path, loop: Loop) -> None:
    at_once = int(run.removeprefix("loop-"))
    shape = Shape(experts=8, rank=8, top_k=2, scaling=2.0, dropout=work.dropout)
    model = put_in(shared_copy(work.base), "mola", "loop+index_add", TARGETS["all-linear"], shape)
    arguments = TrainingArguments(
        **_arguments(work, scratch),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=max(1, work.batch // at_once),
    )
    _by_trainer(model, arguments, work, loop)


def _by_trainer(model: Any, arguments: TrainingArguments, work: Work, loop: Loop) -> None:
    collator = DataCollatorForSeq2Seq(work.tokenizer, padding=True, label_pad_token_id=IGNORED)
    Trainer(model, arguments, collator, _dataset(work.rows), callbacks=[Watch(loop)]).train()


def _trl(work: Work, run: str, scratch: Path, loop: Loop) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": list(e.encoded.input_ids), "completion_mask": [int(one) for one in e.encoded.supervised]}
        for e in work.rows
    ]
    arguments = SFTConfig(
        **_arguments(work, scratch), per_device_train_batch_size=1, packing=True, max_length=PACKED_LENGTH
    )
    SFTTrainer(
        _peft_lora(work),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=work.tokenizer,
        callbacks=[Watch(loop)],
    ).train()


def _arguments(work: Work, scratch: Path) -> dict[str, Any]:
    return {
        "output_dir": str(scratch),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "optim": "adamw_torch_fused",
        "bf16": work.bf16,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "gradient_checkpointing": False,
    }


def _ours(work: Work, run: str, scratch: Path, loop: Loop) -> None:
    method, names = METHODS[run], list(work.examples)
    experts = ["mixed"] if method.expert_count == "one" else names
    config = LoramixConfig(
        method=run,
        experts=experts,
        r=8,
        lora_alpha=16,
        lora_dropout=work.dropout,
        target_modules=list(TARGETS["all-linear"]),
    )
    model = get_peft_model(shared_copy(work.base), config).train()
    settings = TrainingSettings(
        num_train_epochs=1.0, per_device_train_batch_size=work.batch, learning_rate=RATE, bf16=work.bf16
    )
    true = MixtureTrainer.__init__

    def watched(trainer: MixtureTrainer, *args: Any, **kwargs: Any) -> None:
        true(trainer, *args, **kwargs)
        trainer.add_callback(Watch(loop))

    MixtureTrainer.__init__ = watched  # type: ignore[method-assign]
    try:
        train_stage(
            model,
            work.examples,
            domains=names,
            title=run,
            settings=settings,
            shares={name: 1 / len(names) for name in names},
            pad_token_id=work.tokenizer.pad_token_id,
            output_dir=scratch,
            log_file=scratch / "log.jsonl",
            console=Console(quiet=True),
            auxiliary=dict(method.losses),
        )
    finally:
        MixtureTrainer.__init__ = true  # type: ignore[method-assign]
