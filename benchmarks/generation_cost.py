"""What does it cost to answer with a mixture: routed against pinned, rows of different experts, token routers?

    python benchmarks/generation_cost.py [--json] [--out FILE]
    python benchmarks/generation_cost.py --rows 1 --new-tokens 8 --repetitions 1

`generate` on the built-in base in fp32, greedy, with a key-value cache: prompts of the demo data, cut or lengthened to
the same number of tokens, and a fixed number of new ones. Experts and routers are random, B is not zero. In each
repetition every side answers with one new token and with all, in random order, after a round that warms up.

    base       the base alone
    pinned     moa, every row with `expert=` the same
    routed     moa, the expert of each row settled by its routers, which read the prompt with the base first
    mixed      moa, every row with `expert=` another one (several rows only)
    mola, mosld, mixlora    routed token by token

    prompt_ratio  CPU seconds up to the first token, over those of the side compared with; median
    token_ratio   the same for the tokens after the first
    whole_ratio   the same for all of it

Everything is over the base; `routed` and `mixed` are over `pinned` as well. How a mixture is served: serving.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import shared_copy
from peft import get_peft_model
from torch import Tensor, nn

from loramix import LoramixConfig
from loramix.cli.output import quiet_libraries
from loramix.data.demo import demo_data
from loramix.environment import environment
from loramix.models import load_base, load_tokenizer

TOKEN_ROUTED = ("mola", "mosld", "mixlora")
SIDES = ("base", "pinned", "routed", "mixed", *TOKEN_ROUTED)
OVER = {"routed": ("base", "pinned"), "mixed": ("base", "pinned")}
"""What a side is compared with; the base alone where nothing is said."""

Answer = Callable[[int], Tensor]
"""Generates as many tokens and returns the ids of prompt and answer."""


@dataclass
class Costs:
    """CPU seconds of one side, by repetition: up to the first token, and for all of it."""

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    @property
    def tokens_s(self) -> list[float]:
        """The tokens after the first."""
        return [whole - first for whole, first in zip(self.whole_s, self.first_s, strict=True)]


def prompts(tokenizer: Any, rows: int, length: int) -> Tensor:
    """Returns prompts of the demo data's domains in turn, (rows, length); short ones are followed by the next."""
    domains = {name: _texts(folder / "test.jsonl") for name, folder in demo_data().items()}
    found = []
    for row in range(rows):
        texts = domains[list(domains)[row % len(domains)]]
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer(texts[(row + len(ids)) % len(texts)])["input_ids"]
        found.append(ids[:length])
    return torch.tensor(found)


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def with_method(base: nn.Module, name: str, experts: int) -> Any:
    """Returns a method on the base, whose experts and routers are random."""
    torch.manual_seed(0)
    config = LoramixConfig(
        method=name,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        **({"experts": [f"expert {e}" for e in range(experts)]} if name == "moa" else {"num_experts": experts}),
        **({} if name in ("moa", "mixlora") else {"allocation": "uniform"}),
    )
    model = get_peft_model(shared_copy(base), config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".B_EOR"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def sides_of(models: dict[str, Any], ids_BT: Tensor, names: list[str]) -> dict[str, Answer]:
    """Returns how each side generates."""
    rows = len(ids_BT)
    experts = (
        [f"expert {e}" for e in range(models["moa"].peft_config["default"].num_experts)] if "moa" in models else []
    )
    told: dict[str, dict[str, Any]] = {
        "pinned": {"expert": experts[0] if experts else None},
        "mixed": {"expert": [experts[row % len(experts)] for row in range(rows)] if experts else None},
    }

    def side(name: str) -> Answer:
        model = models["moa" if name in ("pinned", "routed", "mixed") else name]

        def answer(count: int) -> Tensor:
            found: Tensor = model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
                **told.get(name, {}),
            )
            return found

        return answer

    return {name: side(name) for name in names if name != "mixed" or rows > 1}


@torch.inference_mode()
def measure(sides: dict[str, Answer], rows: int, asked: argparse.Namespace) -> dict[str, Costs]:
    """Lets the sides take turns."""
    costs = {name: Costs() for name in sides}
    for answer in sides.values():
        answer(2)
    pick = random.Random(0)
    for number in range(asked.repetitions):
        for name in pick.sample(list(sides), len(sides)):
            for count, into in ((1, costs[name].first_s), (asked.new_tokens, costs[name].whole_s)):
                started = time.process_time()
                found = sides[name](count)
                into.append(time.process_time() - started)
                assert found.shape == (rows, asked.prompt_tokens + count), name
        print(f"{time.strftime('%H:%M:%S')} {rows} rows, repetition {number + 1}", file=sys.stderr, flush=True)
    return costs


def table(costs: dict[str, Costs], rows: int, new_tokens: int) -> list[dict[str, Any]]:
    """Returns a row for each side and what it is compared with."""
    found = []
    for name, one in costs.items():
        for other in OVER.get(name, ("base",)):
            if other not in costs:
                continue
            row: dict[str, Any] = {"rows": rows, "side": name, "over": other}
            for ratio, of in (("prompt_ratio", "first_s"), ("token_ratio", "tokens_s"), ("whole_ratio", "whole_s")):
                each = [a / b for a, b in zip(getattr(one, of), getattr(costs[other], of), strict=True)]
                row[ratio] = round(median(each), 3)
                row[f"{ratio}_range"] = [round(min(each), 3), round(max(each), 3)]
            row["prompt_cpu_s"] = round(median(one.first_s), 3)
            row["token_cpu_ms"] = round(1000 * median(one.tokens_s) / (new_tokens - 1), 1)
            found.append(row)
    return found


def shown(one: dict[str, Any]) -> str:
    """Returns a row as a line of the table in docs/inference-cost.md, which leaves the last two columns out."""
    cells = [str(one["rows"]), one["side"], one["over"]]
    for name in ("prompt_ratio", "token_ratio", "whole_ratio"):
        low, high = one[f"{name}_range"]
        cells.append(f"{one[name]:.2f} ({low:.2f} to {high:.2f})")
    cells += [f"{one['prompt_cpu_s']:.2f}", f"{one['token_cpu_ms']:.0f}"]
    return f"| {' | '.join(cells)} |"


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too, anew after each number of rows")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], help="prompts answered together")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.new_tokens < 2:
        parser.error("--new-tokens: expected at least 2; tokens after the first are measured apart")
    if "base" not in asked.sides:
        asked.sides.insert(0, "base")
    return asked


def main() -> None:
    """Measures and prints."""
    asked = arguments()
    quiet_libraries()
    torch.set_num_threads(asked.threads)
    base, tokenizer = load_base(), load_tokenizer()
    methods = {"moa" if name in ("pinned", "routed", "mixed") else name for name in asked.sides} - {"base"}
    models = {"base": base, **{name: with_method(base, name, asked.experts) for name in sorted(methods)}}
    found = environment()
    named = ("prompt_tokens", "new_tokens", "experts", "repetitions", "threads")
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {name: found[name] for name in ("processor", "cores", "memory_gb", "platform", "python")},
        "torch": found["packages"]["torch"],
        "settings": {name: getattr(asked, name) for name in named} | {"rank": 8, "targets": "all-linear"},
        "rows": [],
    }
    for rows in asked.rows:
        sides = sides_of(models, prompts(tokenizer, rows, asked.prompt_tokens), asked.sides)
        for row in table(measure(sides, rows, asked), rows, asked.new_tokens):
            report["rows"].append(row)
            print(shown(row), file=sys.stderr if asked.json else sys.stdout, flush=True)
        report["load_average"] = [round(one, 1) for one in os.getloadavg()]
        if asked.out:
            asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
