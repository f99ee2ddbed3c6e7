"""Which score tells prompts that no expert fits? Each domain left out in turn, its prompts against the others'.

    python benchmarks/abstention.py --data ../shared/data/moa [--cache /tmp/states.pt] [--json]

The base reads 80 training and 40 held-out prompts of each domain of recipes/compare/moa-small.yaml once (ten minutes on
one busy core; --cache keeps what it read). Then, for each pooling, layer and score, and for each domain: everything is
fitted to the training prompts of the other seven, and the held-out prompts of the seven (inside) are compared with
those of the domain left out (outside). Printed: mean AUROC over the eight, and the mean share of outside prompts that
keep an expert when 95 % of the inside ones do. Routers, where a score needs one, are taught on the seven domains alone
(training/router_fit.py). The score that the library has is computed by the library.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from loramix.cli.output import quiet_libraries
from loramix.evaluation.abstention import auroc
from loramix.routers.abstention import SHRINK, fitted

Score = Callable[[Tensor], Tensor]
TRAIN, HELD = 80, 40
LONGER = {"leetcode": 3, "exam": 8}
"""How many times as many rows are drawn where prompts are often longer than max_length and left out."""
RECIPE = Path(__file__).parent.parent / "recipes" / "compare" / "moa-small.yaml"


def read(data: str) -> dict[str, Any]:
    """Returns what the router of each layer reads: (layers, prompts, I) by pooling; split and domain of each prompt."""
    from loramix import load_base, load_tokenizer
    from loramix.corpus import encode_all
    from loramix.experiment import build

    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]
    for name, count in (("max_train_examples", TRAIN), ("max_test_examples", HELD)):
        settings[name] = {domain: count * LONGER.get(domain, 1) for domain in settings["domains"]}
    settings |= {"root": data, "test_fraction": 0.34}
    tokenizer = load_tokenizer()
    encoded = encode_all(build({"output_dir": "unused", "data": settings}, where="here").experiment, tokenizer)
    rows = [
        (split, domain, example.encoded.input_ids[: example.encoded.prompt_length])
        for split, part, most in (("train", encoded.train, TRAIN), ("held", encoded.held, HELD))
        for domain, examples in part.items()
        for example in examples[:most]
    ]
    base = load_base().eval()
    layers: Any = base.model.layers
    found = {pooling: torch.zeros(len(layers), len(rows), base.config.hidden_size) for pooling in ("last", "mean")}
    now: dict[str, Tensor] = {}

    def take(number: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            x, mask, places = inputs[0].float(), now["mask"], now["places"]
            found["last"][number, places] = x[torch.arange(len(places)), mask.sum(dim=1) - 1]
            found["mean"][number, places] = (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

        return hook

    for number, layer in enumerate(layers):
        layer.self_attn.q_proj.register_forward_pre_hook(take(number))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][2]))
    with torch.inference_mode():
        for start in range(0, len(order), 8):
            places = order[start : start + 8]
            ids = [torch.tensor(rows[i][2]) for i in places]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(tokenizer.pad_token_id))
            now["mask"] = (torch.arange(padded.shape[1]) < torch.tensor([len(i) for i in ids])[:, None]).long()
            now["places"] = torch.tensor(places)
            base.model(input_ids=padded, attention_mask=now["mask"], use_cache=False)
            print(f"{start + len(places)} of {len(rows)} prompts", file=sys.stderr)
    return {**found, "split": [row[0] for row in rows], "domain": [row[1] for row in rows]}


def by_router(x: Tensor, y: Tensor, what: str) -> Score:
    """Energy or the largest probability of a router taught on these prompts."""
    from loramix.routers import SequenceRouterConfig, Site
    from loramix.training.router_fit import RouterFit, fit_routers

    torch.manual_seed(0)
    router = SequenceRouterConfig().build(Site(x.shape[1], x.shape[1], int(y.max()) + 1))
    fit_routers({"one": router}, {"one": x}, y, RouterFit())

    @torch.no_grad()
    def score(asked: Tensor) -> Tensor:
        logits = router.logits(asked)
        return -logits.logsumexp(dim=1) if what == "energy" else -logits.softmax(dim=1).amax(dim=1)

    return score


def by_distance(x: Tensor, y: Tensor, dims: int) -> Score:
    """Mahalanobis distance to the nearest mean, without taking the distance to all prompts from it."""
    part = fitted(x, y, int(y.max()) + 1, dims)
    part.background_D.zero_()
    return part.scores


def by_neighbour(x: Tensor, y: Tensor, k: int) -> Score:
    """Cosine distance to the k-th nearest training prompt, about the mean of all."""
    center = x.mean(dim=0)
    known = F.normalize(x - center, dim=1)
    return lambda asked: torch.cdist(F.normalize(asked - center, dim=1), known).topk(k, largest=False).values[:, -1]


def by_mean(x: Tensor, y: Tensor) -> Score:
    """Cosine distance to the nearest domain's mean, about the mean of all."""
    center = x.mean(dim=0)
    means = F.normalize(torch.stack([x[y == e].mean(dim=0) for e in range(int(y.max()) + 1)]) - center, dim=1)
    return lambda asked: -(F.normalize(asked - center, dim=1) @ means.T).amax(dim=1)


SCORES: dict[str, Callable[[Tensor, Tensor], Score]] = {
    "energy": lambda x, y: by_router(x, y, "energy"),
    "max softmax": lambda x, y: by_router(x, y, "softmax"),
    "nearest mean, cosine": by_mean,
    "nearest neighbour, cosine": lambda x, y: by_neighbour(x, y, 1),
    "5th neighbour, cosine": lambda x, y: by_neighbour(x, y, 5),
    "Mahalanobis, 64": lambda x, y: by_distance(x, y, 64),
    "relative Mahalanobis, 16": lambda x, y: fitted(x, y, int(y.max()) + 1, 16).scores,
    "relative Mahalanobis, 32": lambda x, y: fitted(x, y, int(y.max()) + 1, 32).scores,
    "relative Mahalanobis, 64": lambda x, y: fitted(x, y, int(y.max()) + 1, 64).scores,
    "relative Mahalanobis, 128": lambda x, y: fitted(x, y, int(y.max()) + 1, 128).scores,
}


def measured(x: Tensor, labels: Tensor, is_train: Tensor, make: Callable[[Tensor, Tensor], Score]) -> dict[str, Any]:
    """Returns AUROC and the outside prompts kept at 95 % of the inside ones, for each domain left out."""
    areas, kept = [], []
    for domain in range(int(labels.max()) + 1):
        known = is_train & (labels != domain)
        y = labels[known]
        score = make(x[known], torch.where(y > domain, y - 1, y))
        inside, outside = (score(x[~is_train & here]) for here in (labels != domain, labels == domain))
        areas.append(auroc(inside, outside))
        kept.append(float((outside <= inside.quantile(0.95)).float().mean()))
    return {"auroc": areas, "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/moa", help="folder of the recipe's data")
    parser.add_argument("--cache", type=Path, help="file that keeps what the base read (safetensors and JSON beside)")
    parser.add_argument("--layers", type=int, nargs="+", help="by default a quarter of the depth, half, the last")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet_libraries()
    found = _cached(arguments.cache, lambda: read(arguments.data))
    domains = list(dict.fromkeys(found["domain"]))
    labels = torch.tensor([domains.index(domain) for domain in found["domain"]])
    is_train = torch.tensor([split == "train" for split in found["split"]])
    depth = len(found["last"])
    rows = []
    for pooling in ("last", "mean"):
        for layer in arguments.layers or (depth // 4, depth // 2, depth - 1):
            for name, make in SCORES.items():
                got = measured(found[pooling][layer], labels, is_train, make)
                row = {
                    "pooling": pooling,
                    "layer": layer,
                    "score": name,
                    "auroc": round(sum(got["auroc"]) / len(domains), 3),
                    "kept": round(sum(got["kept"]) / len(domains), 3),
                    "by_domain": {d: round(a, 3) for d, a in zip(domains, got["auroc"], strict=True)},
                }
                rows.append(row)
                print(json.dumps(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"shrink": SHRINK, "prompts": len(labels), "rows": rows}, indent=2))


def _cached(file: Path | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what is in the file, made first if it is not there."""
    from safetensors.torch import load_file, save_file

    if file is not None and file.is_file():
        return {**load_file(file), **json.loads(file.with_suffix(".json").read_text())}
    found = make()
    if file is not None:
        save_file({pooling: found[pooling] for pooling in ("last", "mean")}, file)
        file.with_suffix(".json").write_text(json.dumps({key: found[key] for key in ("split", "domain")}))
    return found


if __name__ == "__main__":
    main()
