"""What training costs, data and Trainer included: loramix's mixtures beside one LoRA by PEFT under stock Trainer.

    OMP_NUM_THREADS=1 python benchmarks/train_speed.py --out runs/train_speed.json [--rows 6] [--rounds 3] [--json]

One process, the sides in turn, the same examples of the demo's domains in each round, one pass over them: SmolLM2-135M
in fp32, rank 8 on all linear layers, no dropout, AdamW, the same rows a step but where packing decides. Each side has
its own way of putting batches together. The clock is CPU time of the training loop, from its first step to its last;
ratios are taken within a round and their medians shown.

`stock`         PEFT LoRA, transformers' Trainer, rows padded to the longest of a batch, transformers' loss.
`stock-by-length`  the same with Trainer's grouping of like lengths.
`trl-packing`   the same LoRA under TRL's SFTTrainer with packing.
`lora`, `moa`, `mosld`, `mola`, `mixlora`  loramix; eight experts (each demo domain dealt out to two labels), the
                method's own losses, as `loramix train` trains its last stage.
`loop`          MoLA as peers write it (a loop over experts with gathers), under transformers' Trainer; two rows a time
                (--loop-rows) with gradient accumulation, since a whole batch takes more than 24 GB. Its memory is that
                of two rows.

Memory is what the process's resident memory rises to in the loop, above what it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peers import Shape, put_in, shared_copy
from peft import LoraConfig, get_peft_model
from rich.console import Console
from step_cost import Resident
from step_variants import TARGETS
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from loramix import LoramixConfig, load_base
from loramix.cli.output import quiet_libraries
from loramix.corpus import encode_all
from loramix.data.collation import Example
from loramix.data.demo import demo_data
from loramix.environment import environment
from loramix.experiment import build
from loramix.labels import IGNORED
from loramix.methods import METHODS
from loramix.models import load_tokenizer
from loramix.training.settings import TrainingSettings
from loramix.training.stages import train_stage
from loramix.training.trainer import MixtureTrainer

SIDES = ("stock", "stock-by-length", "trl-packing", "lora", "moa", "mosld", "mola", "mixlora", "loop")
PACKED_LENGTH = 1024
RATE = 1e-4


@dataclass
class Loop:
    """Clocks and memory of one training loop."""

    resident: Resident
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_mib: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self.resident.start()
        self.cpu_s, self.wall_s = time.process_time(), time.monotonic()

    def end(self) -> None:
        self.cpu_s, self.wall_s = time.process_time() - self.cpu_s, time.monotonic() - self.wall_s
        self.peak_mib = self.resident.above()


class Watch(TrainerCallback):
    """Starts and stops the clocks with the loop."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.loop.begin()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.loop.end()


@dataclass(frozen=True)
class Work:
    """What every side learns."""

    base: Any
    tokenizer: Any
    examples: dict[str, list[Example]]
    batch: int
    loop_rows: int = 2

    @property
    def rows(self) -> list[Example]:
        """All examples, domains in turn."""
        return [one for some in zip(*self.examples.values(), strict=False) for one in some]

    @property
    def supervised(self) -> int:
        return sum(one.supervised_tokens for one in self.rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rows", type=int, default=6, help="of each of the eight labels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--loop-rows", type=int, default=2, help="rows that the loop takes at once")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    work, resident = prepared(args), Resident()
    found: dict[str, list[Loop]] = {side: [] for side in args.sides}
    for number in range(args.rounds):
        for side in args.sides:
            loop = Loop(resident)
            with tempfile.TemporaryDirectory() as scratch:
                set_seed(number)
                trained(side)(work, side, Path(scratch), loop)
            found[side].append(loop)
            speed = work.supervised / loop.cpu_s
            print(f"round {number + 1}, {side}: {speed:.1f} supervised tokens/s, {loop.peak_mib} MiB", file=sys.stderr)
    report = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(args).items() if name not in ("json", "out")},
        "examples": len(work.rows),
        "tokens": sum(one.length for one in work.rows),
        "supervised_tokens": work.supervised,
        "rows": [row(side, loops, found.get("stock", []), work.supervised) for side, loops in found.items()],
    }
    text = json.dumps(report, indent=2, default=str)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    else:
        show(report["rows"])
    return 0


def prepared(args: argparse.Namespace) -> Work:
    """Returns base and data: each of the demo's four domains dealt out to two labels, so that there are eight."""
    domains = {name: str(path) for name, path in demo_data().items()}
    content = {
        "method": "lora",
        "output_dir": "unused",
        "data": {"domains": domains, "max_length": args.max_length, "split_in": dict.fromkeys(domains, 2)},
    }
    tokenizer = load_tokenizer()
    data = encode_all(build(content).experiment, tokenizer)
    few = {name: examples[: args.rows] for name, examples in data.train.items()}
    return Work(load_base(), tokenizer, few, args.batch, args.loop_rows)


def trained(side: str) -> Callable[[Work, str, Path, Loop], None]:
    """Returns what trains a side."""
    return {"stock": _stock, "stock-by-length": _stock, "loop": _stock, "trl-packing": _trl}.get(side, _ours)


def _peft_lora(base: Any) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS["all-linear"]))
    return get_peft_model(shared_copy(base), config)


def _dataset(rows: Sequence[Example]) -> Dataset:
    labels = [
        [token if wanted else IGNORED for token, wanted in zip(e.encoded.input_ids, e.encoded.supervised, strict=True)]
        for e in rows
    ]
    return Dataset.from_dict({"input_ids": [list(e.encoded.input_ids) for e in rows], "labels": labels})


def _stock(work: Work, side: str, scratch: Path, loop: Loop) -> None:
    if side != "loop":
        model = _peft_lora(work.base)
    else:
        shape = Shape(experts=8, rank=8, top_k=2, scaling=2.0)
        model = put_in(shared_copy(work.base), "mola", "loop+index_add", TARGETS["all-linear"], shape)
    arguments = TrainingArguments(
        **_arguments(scratch),
        per_device_train_batch_size=work.loop_rows if side == "loop" else work.batch,
        gradient_accumulation_steps=max(1, work.batch // work.loop_rows) if side == "loop" else 1,
        train_sampling_strategy="group_by_length" if side == "stock-by-length" else "random",
    )
    collator = DataCollatorForSeq2Seq(work.tokenizer, padding=True, label_pad_token_id=IGNORED)
    Trainer(model, arguments, collator, _dataset(work.rows), callbacks=[Watch(loop)]).train()


def _trl(work: Work, side: str, scratch: Path, loop: Loop) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": list(e.encoded.input_ids), "completion_mask": [int(one) for one in e.encoded.supervised]}
        for e in work.rows
    ]
    arguments = SFTConfig(
        **_arguments(scratch), per_device_train_batch_size=1, packing=True, max_length=PACKED_LENGTH, bf16=False
    )
    SFTTrainer(
        _peft_lora(work.base),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=work.tokenizer,
        callbacks=[Watch(loop)],
    ).train()


def _arguments(scratch: Path) -> dict[str, Any]:
    return {
        "output_dir": str(scratch),
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "gradient_checkpointing": False,
    }


def _ours(work: Work, side: str, scratch: Path, loop: Loop) -> None:
    method, names = METHODS[side], list(work.examples)
    experts = ["mixed"] if method.expert_count == "one" else names
    config = LoramixConfig(
        method=side, experts=experts, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS["all-linear"])
    )
    model = get_peft_model(shared_copy(work.base), config).train()
    settings = TrainingSettings(num_train_epochs=1.0, per_device_train_batch_size=work.batch, learning_rate=RATE)
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
            title=side,
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


def row(side: str, loops: list[Loop], stock: list[Loop], supervised: int) -> dict[str, Any]:
    """Returns the figures of a side: medians over rounds, ratios within them."""
    time_ratios = [first.cpu_s / own.cpu_s for first, own in zip(stock, loops, strict=False)]
    memory = [one.peak_mib[0] for one in loops if one.peak_mib]
    memory_ratios = [
        own.peak_mib[0] / first.peak_mib[0]
        for first, own in zip(stock, loops, strict=False)
        if own.peak_mib and first.peak_mib
    ]
    return {
        "name": side,
        "supervised_tokens_per_s": round(supervised / median(one.cpu_s for one in loops), 2),
        "supervised_tokens_per_s_wall": round(supervised / median(one.wall_s for one in loops), 2),
        "supervised_tokens_per_s_ratio": round(median(time_ratios), 3) if time_ratios else None,
        "ratios": [round(one, 3) for one in time_ratios],
        "peak_memory_mib": round(median(memory), 1) if memory else None,
        "peak_memory_ratio": round(median(memory_ratios), 3) if memory_ratios else None,
    }


def show(rows: list[dict[str, Any]]) -> None:
    print("| | supervised tokens/s | ratio to stock | memory, MiB | ratio |\n|---|---:|---:|---:|---:|")
    for one in rows:
        print(
            f"| {one['name']} | {one['supervised_tokens_per_s']} | {one['supervised_tokens_per_s_ratio']} | "
            f"{one['peak_memory_mib']} | {one['peak_memory_ratio']} |"
        )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
