"""What training costs, data and Trainer included: loramix's mixtures beside one LoRA by PEFT under stock Trainer.

    OMP_NUM_THREADS=1 python benchmarks/train_speed.py --out runs/train_speed.json [--rows 6] [--rounds 3] [--json]
    OMP_NUM_THREADS=1 python benchmarks/train_speed.py --bf16 --dropout 0.05 --out runs/train_speed_bf16.json

One process, the sides in turn, the same examples of the demo's domains in each round, one pass over them: SmolLM2-135M,
rank 8 on all linear layers, AdamW, the same rows a step but where packing decides. Each side has its own way of putting
batches together. Each takes a step that does not count before the first round; each round begins with another side.
The clock is CPU time of the training loop, from its first step to its last; ratios are taken within a round and their
medians shown.

`stock`         PEFT LoRA, transformers' Trainer, rows padded to the longest of a batch, transformers' loss.
`stock-by-length`  the same with Trainer's grouping of like lengths.
`trl-packing`   the same LoRA under TRL's SFTTrainer with packing.
`lora`, `moa`, `mosld`, `mola`, `mixlora`  loramix; eight experts (each demo domain dealt out to two labels), the
                method's own losses, as `loramix train` trains its last stage. `over_trl` and `over_loop` are their
                speeds beside those two sides.
`loop`          MoLA as peers write it (a loop over experts with gathers), under transformers' Trainer. It takes fewer
                rows at once (--loop-rows) and accumulates gradients: eight rows need about 24 GB in fp32 and do not
                fit. Each number of rows is measured, as `loop-2` and `loop-4`; `loop` is the fastest of them by its
                median. Its memory is that of so many rows.

Types. By default everything is fp32. With --bf16 every side has the base's weights in bfloat16, its forward in autocast
to bfloat16 (`bf16=True`, which accelerate puts around the model's forward, outputs back in fp32), and adapters, routers
and AdamW's state in fp32: PEFT's default for LoRA and loramix, what nn.Linear is made of for the peers' loop. stock
and the loop take their loss from the model, within autocast; TRL works out its own in chunks (parts of it in fp32), and
loramix its own from bfloat16 states and head. The loop's routers run in bfloat16, as autocast makes them; loramix's in
fp32, and its experts in the type that their backend has in autocast.

--dropout P is the adapters' input dropout in every side (0 by default): PEFT's `lora_dropout`; loramix's, one draw for
all experts of a module; the loop's, one draw for each expert on the tokens it is given. MoSLD's own dropout on the
matrix that its experts share is there at any P.

Memory is what the process's resident memory rises to in the loop, above what it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_cost import Resident
from train_sides import OURS, SIDES, Work, prepared, trained
from training_loops import Loop
from transformers import set_seed

from loramix.cli.output import quiet_libraries
from loramix.environment import environment


def main() -> int:
    asked = arguments()
    quiet_libraries()
    with redirect_stdout(sys.stderr):  # stock trainers print there; what comes out is the report alone
        work = prepared(
            asked.rows, max_length=asked.max_length, batch=asked.batch, bf16=asked.bf16, dropout=asked.dropout
        )
        loops = measured(work, runs(asked.sides, asked.loop_rows), asked.rounds)
    report = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "arguments": {name: value for name, value in vars(asked).items() if name not in ("json", "out")},
        "examples": len(work.rows),
        "tokens": sum(one.length for one in work.rows),
        "supervised_tokens": work.supervised,
        "rows": rows(loops, work.supervised),
    }
    text = json.dumps(report, indent=2, default=str)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n", encoding="utf-8")
    if asked.json:
        print(text)
    else:
        show(report["rows"])
    return 0


def arguments() -> argparse.Namespace:
    """Returns what was asked on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rows", type=int, default=6, help="of each of the eight labels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--loop-rows", type=int, nargs="+", default=[2, 4], help="rows that the loop takes at once")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="every side: base in bfloat16, products in autocast")
    parser.add_argument("--dropout", type=float, default=0.0, help="every side: on the adapters' input")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    wrong = [number for number in asked.loop_rows if number < 1 or asked.batch % number]
    if wrong and "loop" in asked.sides:
        parser.error(f"--loop-rows {wrong}: expected divisors of --batch {asked.batch}, so that steps are the same.")
    return asked


def runs(sides: Sequence[str], loop_rows: Sequence[int]) -> list[str]:
    """Returns what is run in a round: the sides, the loop once for each number of rows."""
    return [run for side in sides for run in ([f"loop-{n}" for n in loop_rows] if side == "loop" else [side])]


def measured(work: Work, names: Sequence[str], rounds: int) -> dict[str, list[Loop]]:
    """Returns the training loops of each run, which take turns in each round, after an uncounted step of each."""
    resident = Resident()
    first = replace(work, examples={label: some[:1] for label, some in work.examples.items()})
    for name in names:
        looped(first, name, 0, resident)
    found: dict[str, list[Loop]] = {name: [] for name in names}
    for number in range(rounds):
        at = number % len(names)
        for name in (*names[at:], *names[:at]):
            loop = looped(work, name, number, resident)
            found[name].append(loop)
            speed = work.supervised / loop.cpu_s
            print(f"round {number + 1}, {name}: {speed:.1f} supervised tokens/s, {loop.peak_mib} MiB", file=sys.stderr)
    return found


def looped(work: Work, name: str, seed: int, resident: Resident) -> Loop:
    """Trains one run and returns what its loop took."""
    loop = Loop(resident)
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(seed)
        trained(name)(work, name, Path(scratch), loop)
    return loop


def rows(found: dict[str, list[Loop]], supervised: int) -> list[dict[str, Any]]:
    """Returns the figures of all runs; the fastest of the loop's comes first among them, as `loop`."""
    tried = [name for name in found if name.startswith("loop-")]
    fastest = min(tried, key=lambda name: median(one.cpu_s for one in found[name]), default=None)
    best = {"loop": found[fastest]} if fastest else {}
    named = {name: loops for name, loops in found.items() if name not in tried}
    alone = {name: found[name] for name in tried if len(tried) > 1}
    beside = {"trl": found.get("trl-packing", []), "loop": best.get("loop", [])}
    made = []
    for name, loops in (named | best | alone).items():
        made.append(row(name, loops, found.get("stock", []), supervised))
        if name in OURS:
            made[-1] |= {f"over_{other}": _ratio(_faster(theirs, loops)) for other, theirs in beside.items()}
        if name == "loop" and fastest:
            made[-1]["rows_at_once"] = int(fastest.removeprefix("loop-"))
    return made


def row(side: str, loops: list[Loop], stock: list[Loop], supervised: int) -> dict[str, Any]:
    """Returns the figures of a side: medians over rounds, ratios within them."""
    time_ratios = _faster(stock, loops)
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
        "supervised_tokens_per_s_ratio": _ratio(time_ratios),
        "ratios": [round(one, 3) for one in time_ratios],
        "peak_memory_mib": round(median(memory), 1) if memory else None,
        "peak_memory_ratio": _ratio(memory_ratios),
    }


def _faster(others: Sequence[Loop], own: Sequence[Loop]) -> list[float]:
    """Returns how many times as fast as others a side was in each round; nothing where they were not measured."""
    return [other.cpu_s / one.cpu_s for other, one in zip(others, own, strict=False)]


def _ratio(by_round: Sequence[float]) -> float | None:
    return round(median(by_round), 3) if by_round else None


def show(made: Sequence[dict[str, Any]]) -> None:
    print("| | supervised tokens/s | ratio to stock | over TRL | over the loop | memory, MiB | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for one in made:
        name = f"{one['name']}, {one['rows_at_once']} rows at a time" if "rows_at_once" in one else one["name"]
        beside = " | ".join(str(one.get(over) or "") for over in ("over_trl", "over_loop"))
        print(
            f"| {name} | {one['supervised_tokens_per_s']} | {one['supervised_tokens_per_s_ratio']} | {beside} | "
            f"{one['peak_memory_mib']} | {one['peak_memory_ratio']} |"
        )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
