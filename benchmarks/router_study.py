"""Which activation and pooling let a router learn in few steps? Routers alone, on what the base makes of demo prompts.

    python benchmarks/router_study.py [--steps 32 200] [--json]

The base reads 64 training and 96 held-out prompts of each demo domain once; then routers of all layers are trained on
those states, as stage 2 trains them with `reads: base` (AdamW, cosine, batches of 4), in seconds for each setting.
Printed: accuracy on held-out prompts of the last router, of a vote, and the mean over layers; means of two seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loramix.cli.output import quiet_libraries


def states() -> dict[str, Any]:
    """Returns pooled states (layers, prompts, hidden) of both poolings and splits, and the labels."""
    from peft import get_peft_model

    from loramix import LoramixConfig, load_base, load_tokenizer
    from loramix.data.demo import demo_data
    from loramix.data.domains import read_domains
    from loramix.data.prompts import encode_prompts
    from loramix.routing import Call

    base, tokenizer = load_base(), load_tokenizer()
    sources = {domain: str(folder) for domain, folder in demo_data().items()}
    splits = read_domains(sources, max_train_examples=64, max_test_examples=96)
    found: dict[str, Any] = {}
    for pooling in ("last", "mean"):
        experts = list(splits)
        model = get_peft_model(base, LoramixConfig(experts=experts, router={"pooling": pooling})).eval()
        guide = model.base_model.guide
        for split in ("train", "test"):
            parts: list[Tensor] = []
            for domain in splits.values():
                prompts = [record.prompt for record in getattr(domain, split)]
                for start in range(0, len(prompts), 8):
                    batch = encode_prompts(tokenizer, prompts[start : start + 8])
                    mask = batch["attention_mask"].bool()
                    call = Call(mask_BT=mask, prompt_mask_BT=mask)
                    guide.read_prompts(batch["input_ids"], {"attention_mask": batch["attention_mask"]}, call, "last")
                    parts.append(torch.stack(list(call.pooled.values())))
            found[f"{pooling} {split}"] = torch.cat(parts, dim=1)
        base = model.unload()
    for split in ("train", "test"):
        counts = [len(getattr(domain, split)) for domain in splits.values()]
        found[split] = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return found


def accuracy(found: dict[str, Any], pooling: str, activation: str, steps: int, rate: float, seed: int) -> Tensor:
    """Trains the routers of all layers and returns (last, vote, mean over layers)."""
    from loramix.routers import SequenceRouterConfig, Site

    torch.manual_seed(seed)
    train, test = found[f"{pooling} train"], found[f"{pooling} test"]
    labels, truth = found["train"], found["test"]
    experts = int(labels.max()) + 1
    site = Site(train.shape[2], train.shape[2], experts)
    routers = [SequenceRouterConfig(activation=activation).build(site) for _ in train]
    parameters = [p for router in routers for p in router.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / (0.1 * steps))
        optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randperm(len(labels))[:4]
        logits = torch.stack([r.logits(x[rows]) for r, x in zip(routers, train, strict=True)])
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(routers)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        chosen = torch.stack([r.logits(x).argmax(1) for r, x in zip(routers, test, strict=True)])
    voted = F.one_hot(chosen, experts).sum(0).argmax(1)
    by_layer = (chosen == truth).float().mean(1)
    return torch.stack([by_layer[-1], (voted == truth).float().mean(), by_layer.mean()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 200])
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet_libraries()
    found = states()
    rows = []
    for steps, pooling, activation in product(arguments.steps, ("last", "mean"), ("tanh", "gelu", "silu", "relu")):
        runs = [accuracy(found, pooling, activation, steps, arguments.learning_rate, seed) for seed in range(2)]
        last, vote, layers = (round(v, 4) for v in torch.stack(runs).mean(0).tolist())
        row = {
            "steps": steps,
            "pooling": pooling,
            "activation": activation,
            "last": last,
            "vote": vote,
            "layers": layers,
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
