"""Trains every method for 20 steps, saves, loads, generates, with and without activation checkpointing.

    python benchmarks/loss_curves.py tiny               # a random Llama of 50,000 parameters; a minute
    python benchmarks/loss_curves.py smollm2            # the built-in base, two of the demo's domains; half an hour
    python benchmarks/loss_curves.py tiny --methods moa mosld

Stores the loss curves in benchmarks/loss_curves.json, method by method; --again runs anew what is in it already. A
curve is the training loss of the method's last stage, step by step; of its experts' stage where the last one takes no
gradient steps (arrow, lorahub). tests/test_loss_curves.py trains some of the tiny ones anew and compares.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from loramix.cli.output import quiet_libraries
from loramix.environment import environment
from loramix.experiment import build
from loramix.methods import METHODS, Method
from loramix.opening import open_model
from loramix.pipeline import run_experiment
from loramix.run_folder import RunFolder

STORED = Path(__file__).parent / "loss_curves.json"
STEPS = 20
LEARNING_RATES = {"loramix": 5e-4, "prefix": 2e-2, "none": 1e-4}
"""At 2e-3 mola and mixlora diverged on SmolLM2 within 20 steps; the tiny base takes it."""
DOMAINS = ("adds", "greets", "shouts")


def tiny_base(folder: Path) -> Path:
    """Saves a random Llama (2 layers, hidden 32) with a byte tokenizer and returns its folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=tokens[0], bos_token=tokens[1], eos_token=tokens[2]
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_domains(folder: Path) -> dict[str, str]:
    """Writes three domains in alphabets of their own and returns their files."""
    pick = random.Random(0)
    sources = {}
    for domain, letters in zip(DOMAINS, ("0123456789+", "abcdefghij ", "QRSTUVWXYZ!"), strict=True):
        rows = []
        for _ in range(20):
            word = "".join(pick.choices(letters, k=20))
            rows.append(json.dumps({"prompt": word, "completion": letters[:3] + word[:4]}))
        file = folder / f"{domain}.jsonl"
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        sources[domain] = str(file)
    return sources


def settings(base: str, folder: Path, method: Method, checkpointing: bool) -> dict[str, Any]:
    """Returns the experiment of one curve."""
    by_steps = method.stages[-1].takes_steps
    content: dict[str, Any] = {
        "output_dir": str(folder / f"run-{method.name}-{checkpointing}"),
        "method": method.name,
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2 if base == "tiny" else 1,
            "learning_rate": LEARNING_RATES[method.tuner] * (4 if base == "tiny" and method.tuner == "loramix" else 1),
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "activation_checkpointing": checkpointing,
        },
    }
    if method.starts_from_experts:
        content["expert_stage"] = {"max_steps": 5 if by_steps else STEPS}
    if method.stages[-1].search is not None:
        content["search"] = {"budget": 8, "examples_per_domain": 2}
    if base == "tiny":
        if not (folder / "base").exists():
            tiny_base(folder / "base")
        if method.expert_count == "chosen" and method.defaults.get("allocation"):
            content["adapter"] = {"allocation": "24"}
        return {
            **content,
            "model_name_or_path": str(folder / "base"),
            "data": {"domains": tiny_domains(folder), "max_length": 64, "test_fraction": 0.2},
        }
    from loramix.data.demo import demo_data

    short = {name: str(demo_data()[name]) for name in ("medicine", "maths")}
    data = {"domains": short, "max_length": 96, "truncation": "drop"}
    return {**content, "data": {**data, "max_train_examples": 16, "max_test_examples": 4}}


def curve(base: str, folder: Path, method: Method, checkpointing: bool) -> list[float]:
    """Trains, saves, loads and generates; returns the losses of the last stage that takes steps.

    Raises:
        AssertionError: the loaded model answers otherwise than the trained one did.
    """
    loaded = build(settings(base, folder, method, checkpointing)).experiment
    with (folder / "screen").open("a") as screen:
        results = run_experiment(loaded, Console(file=screen))
    run = RunFolder(Path(loaded.output_dir))
    check_answer(results, *open_model(loaded, run))
    entries = [json.loads(line) for line in run.log.read_text(encoding="utf-8").splitlines()]
    stage = entries[-1]["stage"]
    return [round(entry["loss"], 4) for entry in entries if entry["stage"] == stage and "loss" in entry]


def check_answer(results: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Checks that the saved model, loaded again, gives the answer that the trained one gave."""
    import torch

    from loramix.data.prompts import encode_prompts

    for one in results["examples"][:1]:
        batch = {k: v.to(model.device) for k, v in encode_prompts(tokenizer, [one["prompt"]]).items()}
        method = METHODS[results["method"]]
        told = method.settled_by == "domain"
        extra = {"domain_ids": torch.tensor([results["domains"].index(one["domain"])])} if told else {}
        written = model.generate(
            **batch, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id, **extra
        )
        answer = tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer == one["answer"], f"{results['method']}: {answer!r} after loading, {one['answer']!r} before"


def main() -> None:
    """Runs what is missing and stores it, method by method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=("tiny", "smollm2"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    for name in asked.methods:
        curves = stored.setdefault(asked.base, {}).setdefault("curves", {})
        if name in curves and not asked.again:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            plain = curve(asked.base, Path(folder), METHODS[name], False)
            # PEFT's prefix tuning does not work with activation checkpointing; the settings refuse it.
            both = METHODS[name].tuner != "prefix"
            checkpointed = curve(asked.base, Path(folder), METHODS[name], True) if both else None
        curves[name] = {"plain": plain, "checkpointed": checkpointed}
        stored[asked.base]["environment"] = environment()
        STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        about = f"{len(plain)} steps, {plain[0]:.3f} -> {plain[-1]:.3f}, {time.monotonic() - started:.0f} s"
        if checkpointed is not None:
            apart = max(abs(a - b) for a, b in zip(plain, checkpointed, strict=True))
            about += f", checkpointed within {apart:.4f}"
        print(f"{asked.base} {name}: {about}", flush=True)


if __name__ == "__main__":
    main()
