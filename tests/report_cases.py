"""Results as a comparison of some size leaves them, with invented figures: the same at every call.

Two settings, eight domains (some with Chinese and with long names) and an unseen one, thirteen rows, two seeds, metrics
that only some domains have, a row whose cells failed, rows without routing, routers of two kinds, layers with different
numbers of experts. `write_run` writes the folder of a plain `loramix train` run.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LONG = "a-domain-whose-name-nobody-wanted-to-shorten-since-it-says-it-all"
DOMAINS = ["finance", "medicine", "leetcode", "exam", "webgpt", "金融问答", "中文医疗对话与健康咨询", LONG]
UNSEEN = ["mmlu"]
LAYERS = 30
METRICS = {
    "perplexity": ("Perplexity", "lower", 3, DOMAINS + UNSEEN),
    "bleu": ("BLEU", "higher", 1, DOMAINS),
    "choice": ("Accuracy, by letter", "higher", 1, ["exam", *UNSEEN]),
}
# id, method, quality beside the single LoRA, trained parameters, seconds
ROWS = [
    ("base", "base", 1.25, 0, 0.0),
    ("lora/single", "lora", 1.0, 460_800, 812.4),
    ("lora-long/single", "lora-long", 0.985, 460_800, 1530.0),
    ("lora/mixture", "lora", 1.03, 460_800, 1584.2),
    ("moa/mixture", "moa", 0.992, 3_825_152, 1702.9),
    ("moa/mixture/oracle", "moa", 0.99, 3_825_152, 1702.9),
    ("moe-lora/mixture", "moe-lora", 1.01, 4_423_680, 1853.0),
    ("moe-lora/mixture/extracted", "moe-lora", 1.02, 4_423_680, 1853.0),
    ("mola/mixture", "mola", 1.015, 2_764_800, 2141.7),
    ("mosld/single", "mosld", 1.0, 1_843_200, 1907.0),
    ("mosld/mixture", "mosld", 1.012, 1_843_200, 1911.3),
    ("mosld p=0.3, with a long label/mixture", "mosld", 1.02, 1_843_200, 1920.8),
    ("prefix/mixture", "prefix", None, 0, 0.0),
]


def comparison(domains: int = len(DOMAINS), seeds: int = 2) -> dict[str, Any]:
    """Returns the content of a comparison.json.

    Args:
        domains: as many of DOMAINS.
        seeds: with one, no value has a deviation.
    """
    chance = random.Random(7)
    names = DOMAINS[:domains]
    rows = [_row(chance, names, seeds, *row) for row in ROWS]
    return {
        "format": "loramix comparison 1",
        "title": "MoA's eight domains, invented figures",
        "config": {"title": "MoA's eight domains", "seeds": list(range(seeds)), "methods": {"lora": {"r": 8}}},
        "environment": {
            "packages": {"loramix": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64-with-glibc2.36",
            "cores": 2,
            "memory_gb": 25.3,
        },
        "domains": names,
        "unseen": UNSEEN,
        "data": {domain: _counts(chance) for domain in names} | {"mmlu": {"test": _counts(chance)["test"]}},
        "overlap": [
            {"kind": "exact", "train": "exam", "test": "exam", "count": 2, "of": 100, "examples": []},
            {"kind": "near", "train": "finance", "test": "webgpt", "count": 19, "of": 200, "examples": []},
        ],
        "metrics": {
            metric: {
                "title": title,
                "better": better,
                "digits": digits,
                "signatures": {d: f"{metric}|ours|v:1|tok:{d in names[5:]}" for d in have if d in (*names, *UNSEEN)},
            }
            for metric, (title, better, digits, have) in METRICS.items()
        },
        "rows": rows,
        "paired": _paired(chance, rows),
        "routing": {"moa/mixture": _routing(chance, names)},
        "classifier": {"TF-IDF + logistic regression": _accuracy(chance, names, 0.96)},
        "expert_use": {
            "moa/mixture": _use(chance, names, names, [len(names)] * LAYERS),
            "mosld/mixture": _use(chance, names, [str(n) for n in range(8)], [2, 4, 6, 8]),
        },
        "similarity": {
            "moa/mixture": {"experts": names, **{kind: _alike(chance, len(names)) for kind in ("BA", "A", "B")}},
            "mosld/mixture": {
                "experts": [str(n) for n in range(8)],
                "BA": _alike(chance, 8),
                "A": None,
                "B": _alike(chance, 8),
            },
        },
        "curves": {name: _curves(chance, names) for name in ("lora/mixture", "moa/mixture")},
        "examples": [_example(domain) for domain in (names[0], names[min(5, domains - 1)])],
        "judge": None,
    }


def _spread(chance: random.Random, mean: float, seeds: int, width: float) -> dict[str, Any]:
    by_seed = [mean * (1 + chance.uniform(-0.01, 0.01)) for _ in range(seeds)]
    mean = sum(by_seed) / seeds
    std = None if seeds < 2 else (sum((v - mean) ** 2 for v in by_seed) / (seeds - 1)) ** 0.5
    return {"mean": mean, "std": std, "by_seed": by_seed, "low": mean * (1 - width), "high": mean * (1 + width)}


def _row(
    chance: random.Random,
    domains: list[str],
    seeds: int,
    identity: str,
    method: str,
    quality: float | None,
    parameters: int,
    seconds: float,
) -> dict[str, Any]:
    label, setting, routing = (*identity.split("/"), "none", None)[:3] if identity == "base" else _split(identity)
    scores: dict[str, Any] = {}
    for metric, (_, better, _, have) in METRICS.items():
        if quality is None or (routing == "extracted" and metric != "perplexity"):
            continue
        by_domain = {}
        for number, domain in enumerate((*domains, *UNSEEN)):
            if domain not in have or (metric == "bleu" and identity == "mola/mixture" and number == 1):
                continue
            level = (4 + 3 * number) * quality * chance.uniform(0.97, 1.03)
            by_domain[domain] = _spread(chance, level if better == "lower" else 60 / level**0.5, seeds, 0.05)
        whole = [by_domain[domain]["mean"] for domain in domains if domain in by_domain]
        full = all(domain in by_domain for domain in domains if domain in have)
        average = _spread(chance, sum(whole) / len(whole), seeds, 0.02) if whole and full else None
        scores[metric] = {"by_domain": by_domain, "average": average}
    return {
        "id": identity,
        "base": "smollm2-135m-instruct",
        "label": label,
        "title": method,
        "method": method,
        "setting": setting,
        "routing": routing,
        "seeds": [] if quality is None else list(range(seeds)),
        "scores": scores,
        "cost": {
            "trained_parameters": parameters,
            "expert_parameters": parameters,
            "router_parameters": 138_752 if method.startswith("mo") else 0,
            "train_seconds": seconds,
            "train_tokens": round(seconds * 95),
            "measure_seconds": 90.5,
            "peak_memory_mb": 1800.0 if seconds else None,
        },
    }


def _split(identity: str) -> tuple[str, str, str | None]:
    label, setting, *routing = identity.split("/")
    return label, setting, routing[0] if routing else None


def _counts(chance: random.Random) -> dict[str, Any]:
    def part(examples: int) -> dict[str, int]:
        tokens = examples * chance.randint(80, 300)
        cut = {"shortened": chance.randint(0, 9), "dropped": chance.randint(0, 2)}
        return {"examples": examples, "tokens": tokens, "supervised_tokens": tokens // 3, **cut}

    return {"train": part(200), "test": part(40)}


def _paired(chance: random.Random, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    against = next(row for row in rows if row["id"] == "lora/mixture")
    found = []
    for metric in METRICS:
        for row in rows:
            if row is against or metric not in row["scores"]:
                continue
            mine, other = row["scores"][metric], against["scores"][metric]
            width = 0.01 * (other["average"] or next(iter(other["by_domain"].values())))["mean"]
            by_domain = {
                domain: _difference(mine["by_domain"][domain]["mean"] - value["mean"], width, chance)
                for domain, value in other["by_domain"].items()
                if domain in mine["by_domain"]
            }
            complete = mine["average"] is not None and other["average"] is not None
            apart = None if not complete else mine["average"]["mean"] - other["average"]["mean"]
            average = None if apart is None else _difference(apart, width, chance)
            found.append(
                {
                    "metric": metric,
                    "row": row["id"],
                    "against": against["id"],
                    "by_domain": by_domain,
                    "average": average,
                }
            )
    return found


def _difference(apart: float, width: float, chance: random.Random) -> dict[str, float]:
    p = chance.uniform(0, 0.04) if abs(apart) > width else chance.uniform(0.06, 1)
    return {"difference": apart, "low": apart - width, "high": apart + width, "p": p}


def _accuracy(chance: random.Random, domains: list[str], level: float) -> dict[str, Any]:
    confusion = []
    for true in range(len(domains)):
        row = [0] * len(domains)
        for _ in range(40):
            row[true if chance.random() < level else chance.randrange(len(domains))] += 1
        confusion.append(row)
    right = {domain: confusion[n][n] / 40 for n, domain in enumerate(domains)}
    overall = sum(right.values()) / len(right)
    return {"prompts": 40 * len(domains), "accuracy": overall, "by_domain": right, "confusion": confusion}


def _routing(chance: random.Random, domains: list[str]) -> dict[str, Any]:
    decisions = {name: _accuracy(chance, domains, level) for name, level in (("last", 0.97), ("vote", 0.95))}
    decisions["per_layer"] = {**_accuracy(chance, domains, 0.9), "confusion": None}
    for one in decisions.values():
        del one["prompts"]
    bins = [
        {
            "low": n / 10,
            "high": (n + 1) / 10,
            "count": 2 + 60 * (n == 9),
            "confidence": n / 10 + 0.06,
            "accuracy": n / 9,
        }
        for n in range(4, 10)
    ]
    return {
        "prompts": 40 * len(domains),
        "decision": "last",
        "decisions": decisions,
        "by_layer": {f"model.layers.{n}": min(0.985, 0.7 + 0.02 * n) for n in range(LAYERS)},
        "calibration": {"ece": 0.042, "bins": bins},
    }


def _use(chance: random.Random, domains: list[str], experts: list[str], layers: list[int]) -> dict[str, Any]:
    def shares(count: int, favourite: int) -> list[float]:
        parts = [chance.random() + 3 * (n == favourite % count) for n in range(count)]
        return [part / sum(parts) for part in parts]

    return {
        "layers": [str(n) for n in range(len(layers))],
        "experts": experts,
        "by_domain": {domain: [shares(count, n) for count in layers] for n, domain in enumerate(domains)},
    }


def _alike(chance: random.Random, count: int) -> list[list[float]]:
    upper = [[chance.uniform(-0.2, 0.9) for _ in range(count)] for _ in range(count)]
    return [[1.0 if i == j else upper[min(i, j)][max(i, j)] for j in range(count)] for i in range(count)]


def _curves(chance: random.Random, domains: list[str]) -> dict[str, list[list[float]]]:
    return {
        domain: [[step, 2.5 * 0.97 ** (step / 10) + 0.2 * n + chance.uniform(0, 0.1)] for step in range(10, 210, 10)]
        for n, domain in enumerate([*domains, "all"])
    }


def _example(domain: str) -> dict[str, Any]:
    answers = {row[0]: f"An answer of {row[0]} about {domain}." for row in ROWS if row[2] is not None}
    answers["base"] = ""
    return {
        "domain": domain,
        "prompt": f"Question of {domain}: 什么是利率\n\nExplain it in two sentences, with an example.",
        "reference": "Interest is the price of money over time.\n\n```\nx = 1.05 ** years\n```",
        "answers": answers,
    }


def write_comparison(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """Writes comparison.json into a folder and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content if content is not None else comparison(), ensure_ascii=False)
    (folder / "comparison.json").write_text(text, encoding="utf-8")
    return folder


def write_run(folder: Path) -> Path:
    """Writes what `loramix train` leaves and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    domains = ["finance", "金融问答"]
    models = {"base": 30.0, "single": 20.0, "mixed": 21.0, "moa_oracle": 19.0, "moa_routed": 19.5}
    results = {
        "method": "moa",
        "domains": domains,
        "rows": [
            {"domain": domain, "model": model, "perplexity": value + n, "nll": 3.0, "tokens": 900}
            for model, value in models.items()
            for n, domain in enumerate(domains)
        ],
        "router_accuracy": {domain: {"last": 0.95, "vote": 0.9} for domain in domains},
        "router_accuracy_overall": {"last": 0.95, "vote": 0.9},
        "router_accuracy_by_layer": {"model.layers.0": 0.6, "model.layers.1": 0.95},
        "router_confusion": {"last": [[19, 1], [1, 19]]},
        "router_prompts": 40,
        "router_calibration": {
            "ece": 0.03,
            "bins": [{"low": 0.9, "high": 1.0, "count": 40, "confidence": 0.98, "accuracy": 0.95}],
        },
        "examples": [{"domain": "finance", "prompt": "What is a bond?", "reference": "A loan.", "answer": "A loan"}],
    }
    data = {domain: _counts(random.Random(1)) for domain in domains}
    log = [
        {"stage": stage, "step": step, "loss": 3.0 - step / 10, f"loss/{domain}": 3.0 - step / 10}
        for stage, domain in (("expert finance", "finance"), ("expert 金融问答", "金融问答"), ("joint", "finance"))
        for step in (1, 2, 3)
    ]
    (folder / "results.json").write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(comparison()["environment"]), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    return folder
