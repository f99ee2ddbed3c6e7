"""When no expert fits: the score against slow loops, rows of the base bit for bit, calibration, files, the request."""

from __future__ import annotations

import copy
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from loramix import ConfigError, DataError, LoramixConfig, ModelError
from loramix.data.collation import Example
from loramix.data.prompts import Encoded
from loramix.evaluation.abstention import auroc, histogram, left_out, outside
from loramix.lifecycle.calibration import Calibration, calibrate, states
from loramix.routers.abstention import SHRINK, Abstention, fitted, threshold_for
from tests import tiny

TOKENS = {"red": (3, 20), "green": (20, 36), "blue": (36, 50), "none": (50, 64)}
"""Each domain has token ids of its own; nobody learns "none"."""
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}


def prompts(domain: str, count: int, seed: int = 0) -> list[list[int]]:
    pick = random.Random(f"{domain} {seed}")
    return [pick.choices(range(*TOKENS[domain]), k=pick.randint(6, 12)) for _ in range(count)]


def examples(domain: str, count: int, seed: int = 0) -> list[Example]:
    label = tiny.EXPERTS.index(domain) if domain in tiny.EXPERTS else -1
    answer = [9, 2]
    return [
        Example(Encoded([*ids, *answer], [False] * len(ids) + [True] * 2, len(ids)), label)
        for ids in prompts(domain, count, seed)
    ]


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[tiny.PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def mixture(**settings: Any) -> Any:
    return tiny.moa(router={"pooling": "mean"}, **settings)


def calibrated(keep: float = 0.9, **settings: Any) -> tuple[Any, Calibration]:
    model = mixture(**settings)
    train, held = ({d: examples(d, count, seed) for d in tiny.EXPERTS} for seed, count in ((0, 30), (1, 20)))
    return model, calibrate(model, train, held, pad_token_id=tiny.PAD, keep=keep)


@pytest.fixture(scope="module")
def ready() -> tuple[Any, Calibration]:
    """A calibrated model; tests that change it work on a copy."""
    return calibrated()


@pytest.fixture
def mixed(ready) -> dict[str, torch.Tensor]:
    """Rows that are the base's beside rows that are not, of unequal length: base, expert, base, expert."""
    model, _ = ready
    outer = [p for p in prompts("none", 40) if model.route(**batch(p))[0].expert == "base"]
    inner = [p for d in ("red", "blue") for p in prompts(d, 5) if model.route(**batch(p))[0].expert != "base"]
    short, long = min(outer, key=len), max(outer, key=len)
    assert len(short) < len(long)
    return batch(short, inner[0], long, inner[-1])


# ---- the score ---------------------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, y: np.ndarray, dims: int, asked: np.ndarray) -> list[float]:
    """The definition in loops: distances by inverse covariances, no whitening, no turning."""
    domains = sorted(set(y.tolist()))
    center = np.mean([x[y == e].mean(0) for e in domains], axis=0)
    weights = np.array([1 / (len(domains) * (y == label).sum()) for label in y])
    total = sum(w * np.outer(row - center, row - center) for w, row in zip(weights, x, strict=True))
    values, vectors = np.linalg.eigh(total)
    basis = vectors[:, np.argsort(values)[::-1][:dims]]
    z = (x - center) @ basis
    means = {e: z[y == e].mean(0) for e in domains}

    def shrunk(rows: np.ndarray) -> np.ndarray:
        covariance = sum(w * np.outer(row, row) for w, row in zip(weights, rows, strict=True))
        return (1 - SHRINK) * covariance + SHRINK * np.trace(covariance) / dims * np.eye(dims)

    within = np.linalg.inv(shrunk(np.array([row - means[label] for row, label in zip(z, y.tolist(), strict=True)])))
    whole = np.linalg.inv(shrunk(z))
    found = []
    for one in (asked - center) @ basis:
        nearest = min((one - m) @ within @ (one - m) for m in means.values())
        found.append((nearest - one @ whole @ one) / dims)
    return found


@pytest.mark.parametrize("dims", [3, 6])
def test_the_score_is_that_of_slow_loops(dims: int):
    draw = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [30, 12, 20])
    x = draw.normal(size=(62, 6)) * [3, 2, 1, 1, 0.5, 0.2] + draw.normal(size=(3, 6))[y] * 4
    asked = draw.normal(size=(9, 6)) * 5
    part = fitted(torch.tensor(x).float(), torch.tensor(y), 3, dims)
    assert part.means_ED.shape == (3, dims)
    np.testing.assert_allclose(part.scores(torch.tensor(asked).float()).numpy(), by_hand(x, y, dims, asked), rtol=2e-4)


def test_few_prompts_and_equal_ones_are_enough():
    few = fitted(torch.randn(4, 32), torch.tensor([0, 0, 1, 1]), 2, 64)
    assert few.means_ED.shape == (2, 3), "four prompts span three directions"
    assert torch.isfinite(few.scores(torch.randn(3, 32))).all()
    same = fitted(torch.ones(4, 8), torch.tensor([0, 0, 1, 1]), 2)
    assert torch.isfinite(same.scores(torch.randn(3, 8))).all()
    assert same.scores(torch.ones(1, 8)).item() == 0


def test_the_part_stays_fp32_and_trains_nothing():
    part = fitted(torch.randn(40, 8), torch.arange(40) % 2, 2)
    wanted = part.scores(torch.ones(1, 8))
    assert torch.equal(copy.deepcopy(part).to(torch.bfloat16).scores(torch.ones(1, 8)), wanted)
    assert not list(part.parameters())


@pytest.mark.parametrize(("count", "keep"), [(20, 0.95), (19, 0.95), (200, 0.9), (7, 0.5), (5, 1.0), (3, 0.01)])
def test_the_threshold_keeps_what_is_asked(count: int, keep: float):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count))
    threshold = threshold_for(scores, keep)
    kept = sum(float(score) <= threshold for score in scores)
    assert kept == min(count, math.ceil(keep * (count + 1) - 1e-9))
    assert threshold not in scores.tolist()


def test_auroc_counts_pairs():
    inside, beyond = torch.tensor([0.0, 1.0, 1.0, 3.0]), torch.tensor([1.0, 2.0, 5.0])
    pairs = [(b > a) + 0.5 * (b == a) for a in inside.tolist() for b in beyond.tolist()]
    assert auroc(inside, beyond) == pytest.approx(sum(pairs) / 12)
    assert outside(inside, beyond, 1.5).abstained == pytest.approx(2 / 3)
    spread = histogram(inside, beyond)
    assert sum(spread["inside"]) == pytest.approx(1)
    assert sum(spread["outside"]) == pytest.approx(1)
    assert len(spread["edges"]) == len(spread["inside"]) + 1


# ---- calibration -------------------------------------------------------------------------------------------------


def test_calibration_keeps_the_asked_share_and_finds_strangers(ready):
    model, found = ready
    kept = (found.inside() <= found.config.threshold).double().mean()
    assert kept >= found.config.keep
    assert kept <= found.config.keep + 2 / 60 + 0.01
    assert model.peft_config["default"].abstention["layer"] == "layers.2"
    strangers = (
        model.base_model.guide.active()
        .doors["layers.2"]
        .router("default")
        .abstention.scores(states(model, examples("none", 20), "layers.2", pad_token_id=tiny.PAD))
    )
    assert auroc(found.inside(), strangers) > 0.8
    beyond, *_ = left_out(found.train, found.held, 0.9, 64)
    assert set(beyond) == set(tiny.EXPERTS)
    assert all(one.auroc > 0.7 for one in beyond.values())


def test_a_request_meets_the_scores_of_the_calibration(ready):
    """Left padding, other batches: the same prompts, the same side of the threshold."""
    model, found = ready
    held = [ids for d in tiny.EXPERTS for ids in prompts(d, 20, 1)]
    routes = [r for start in range(0, 60, 7) for r in model.route(**batch(*held[start : start + 7]))]
    np.testing.assert_allclose([r.score for r in routes], found.inside().tolist(), atol=1e-4)
    assert [r.expert == "base" for r in routes] == (found.inside() > found.config.threshold).tolist()
    assert all(r.threshold == found.config.threshold for r in routes)


def test_the_layer_is_that_of_the_decision():
    _, found = calibrated(decision="layer:1")
    assert found.config.layer == "layers.1"
    assert calibrated(decision="vote")[1].config.layer == "layers.2"


def test_what_cannot_be_calibrated_is_refused():
    some = {d: examples(d, 4) for d in tiny.EXPERTS}
    with pytest.raises(ConfigError, match="reads = 'experts'"):
        calibrate(tiny.moa(router={"reads": "experts"}), some, some, pad_token_id=0)
    with pytest.raises(ConfigError, match="keep = 0"):
        calibrate(tiny.moa(), some, some, pad_token_id=0, keep=0)
    with pytest.raises(DataError, match="in the same order"):
        calibrate(tiny.moa(), {"red": some["red"]}, some, pad_token_id=0)
    with pytest.raises(DataError, match="'blue' has no held-out"):
        calibrate(tiny.moa(), some, {**some, "blue": []}, pad_token_id=0)


# ---- rows of the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "loop", "concat", "per_sequence"])
@pytest.mark.parametrize("decision", ["last", "vote", "per_layer", "layer:0"])
def test_rows_without_expert_are_the_bases_bit_for_bit(ready, mixed, backend: str, decision: str):
    model = copy.deepcopy(ready[0])
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    with torch.no_grad():
        found = model(**mixed, decision=decision).logits
        without = model(**mixed, decision=decision, abstain=False).logits
        with model.disable_adapter():
            base = model(**mixed).logits
    assert [r.expert == "base" for r in model.route(**mixed, decision=decision)] == [True, False, True, False]
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    assert torch.equal(found[[1, 3]], without[[1, 3]])
    for row in range(4):
        assert not torch.equal(without[row], base[row])


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("decision", [None, "per_layer"])
def test_generation_of_such_rows_is_the_bases(ready, mixed, how: dict[str, Any], decision: str | None):
    model, times = ready[0], how.get("num_return_sequences", 1)
    found = model.generate(**mixed, **GENERATE, **how, decision=decision).view(4, times, -1)
    without = model.generate(**mixed, **GENERATE, **how, decision=decision, abstain=False).view(4, times, -1)
    with model.disable_adapter():
        base = model.generate(**mixed, **GENERATE, **how).view(4, times, -1)
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    assert torch.equal(found[[1, 3]], without[[1, 3]])
    assert not torch.equal(without[[0, 2]], base[[0, 2]])


def test_a_cache_keeps_its_rows_with_the_base(ready, mixed):
    model = ready[0]
    with torch.no_grad():
        first = model(**mixed, use_cache=True)
        more = torch.tensor([[5, 6]] * 4)
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 2, dtype=torch.int64)], dim=1)
        found = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values).logits
        with model.disable_adapter():
            first = model(**mixed, use_cache=True)
            base = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values).logits
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    assert not torch.equal(found[[1, 3]], base[[1, 3]])


def test_the_base_can_be_pinned_without_any_calibration(mixed):
    model = mixture()
    with model.disable_adapter():
        base = model.generate(**mixed, **GENERATE)
    assert torch.equal(model.generate(**mixed, **GENERATE, expert="base"), base)
    some = model.generate(**mixed, **GENERATE, expert=["base", "red", "base", "blue"])
    assert torch.equal(some[[0, 2]], base[[0, 2]])
    route = model.route(**mixed, expert="base")[0]
    assert (route.expert, route.probabilities["base"], route.probabilities["red"]) == ("base", 1.0, 0.0)
    with pytest.raises(ConfigError, match="or base"):
        model.route(**mixed, expert="basis")


# ---- the request -------------------------------------------------------------------------------------------------


def test_each_request_may_ask_otherwise(ready, mixed):
    model = ready[0]
    asked, unasked = model.route(**mixed), model.route(**mixed, abstain=False)
    assert [r.expert for r in asked[::2]] == ["base", "base"]
    assert all(r.score > r.threshold and r.probability is None for r in asked[::2])
    assert [r.probabilities for r in asked] == [r.probabilities for r in unasked], "who would answer is still told"
    assert all(r.expert in tiny.EXPERTS and r.score is None and r.threshold is None for r in unasked)
    assert model.route(**mixed, abstain=True) == asked
    plain = mixture()
    assert plain.route(**mixed)[0].score is None
    for ask in (plain.route, plain.generate, plain):
        with pytest.raises(ConfigError, match="not calibrated"):
            ask(**mixed, abstain=True)
    for ask in (model.route, model.generate):
        with pytest.raises(ConfigError, match="contradict"):
            ask(**mixed, abstain=True, expert="red")


def test_reading_goes_as_deep_as_decision_or_calibration_needs(ready, mixed):
    routes = ready[0].route(**mixed, decision="layer:0")
    assert [r.expert == "base" for r in routes] == [True, False, True, False]
    assert set(ready[0].route(**mixed, decision="layer:0", abstain=False)[0].votes) == {"layers.0"}


def test_training_is_not_concerned(ready):
    model = copy.deepcopy(ready[0]).train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if "abstention" in name}
    out = model(input_ids=tiny.ids(), labels=tiny.labels(tiny.ids()), domain_ids=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert len(before) == 4
    for name, tensor in model.named_buffers():
        assert name not in before or (torch.equal(tensor, before[name]) and not tensor.requires_grad)


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, ready) -> Path:
    tiny.llama().save_pretrained(tmp_path / "base")
    ready[0].save_pretrained(tmp_path / "adapter")
    return tmp_path


def _base(folder: Path, **how: Any) -> Any:
    return type(tiny.llama()).from_pretrained(folder / "base", **how).eval()


def test_it_is_saved_with_the_adapter_and_comes_back(saved, ready, mixed):
    with torch.no_grad():
        wanted = ready[0](**mixed).logits
        for how in ({}, {"low_cpu_mem_usage": True}):
            again = PeftModel.from_pretrained(_base(saved), str(saved / "adapter"), **how)
            assert torch.equal(again(**mixed).logits, wanted)
            assert again.route(**mixed) == ready[0].route(**mixed)
        by_transformers = _base(saved)
        by_transformers.load_adapter(str(saved / "adapter"))
        assert torch.equal(by_transformers.eval()(**mixed).logits, wanted)
    again.save_pretrained(saved / "again")
    name = "adapter_model.safetensors"
    assert (saved / "again" / name).read_bytes() == (saved / "adapter" / name).read_bytes()


def test_scores_are_not_rounded_by_a_16_bit_base(saved, ready):
    wanted = {n: b for n, b in ready[0].named_buffers() if "abstention" in n}
    by_peft = PeftModel.from_pretrained(_base(saved, dtype=torch.bfloat16), str(saved / "adapter"))
    by_transformers = _base(saved, dtype=torch.bfloat16)
    by_transformers.load_adapter(str(saved / "adapter"))
    for model in (by_peft, by_transformers):
        found = {n: b for n, b in model.named_buffers() if "abstention" in n}
        assert len(found) == 4
        for name, tensor in found.items():
            same = next(b for n, b in wanted.items() if n.endswith(name.removeprefix("base_model.")))
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, same)


DAMAGES = {
    "missing": (lambda t, key: t.pop(key), "is missing"),
    "of another shape": (lambda t, key: t.update({key: torch.zeros(7, 7)}), "has shape"),
    "NaN": (lambda t, key: t[key].fill_(float("nan")), "NaN or infinity"),
}


@pytest.mark.parametrize("door", ["peft", "transformers"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_calibration_that_is_not_whole_is_refused(saved, damage: str, door: str):
    harm, message = DAMAGES[damage]
    file = saved / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    harm(tensors, next(k for k in tensors if k.endswith("abstention.means_ED")))
    save_file(tensors, file, metadata={"format": "pt"})
    load = partial(PeftModel.from_pretrained, _base(saved)) if door == "peft" else _base(saved).load_adapter
    with pytest.raises(ModelError, match=message):
        load(str(saved / "adapter"))


def test_settings_without_tensors_and_tensors_without_settings_are_refused(saved):
    file = saved / "adapter/adapter_config.json"
    config = json.loads(file.read_text())
    for changed, message in (
        ({**config, "abstention": None}, "not used"),
        ({**config, "abstention": {**config["abstention"], "layer": "layers.9"}}, "not used"),
        ({**config, "abstention": {**config["abstention"], "layer": "layers.0"}}, "is missing"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=message):
            PeftModel.from_pretrained(_base(saved), str(saved / "adapter"))
    part = config["abstention"]
    wrong = {**part, "kind": "energy", "dims": 0, "threshold": float("nan"), "keep": 2}
    with pytest.raises(ConfigError) as caught:
        LoramixConfig(experts=tiny.EXPERTS, abstention=wrong)
    for word in ("kind = 'energy'", "dims = 0", "threshold = nan", "keep = 2"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match=r"abstention.thresold: no such setting.*Did you mean"):
        LoramixConfig(experts=tiny.EXPERTS, abstention={**part, "thresold": 1})
    with pytest.raises(ConfigError, match="no reading of the prompt by the base"):
        LoramixConfig(method="mosld", num_experts=2, abstention=part)
    with pytest.raises(ConfigError, match="'base' stands for the base"):
        LoramixConfig(experts=["base", "red"])


def test_an_adapter_without_calibration_is_what_it_was(tmp_path, saved):
    mixture().save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert "abstention" not in config
    plain, with_it = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "adapter"))
    assert not any("abstention" in name for name in plain)
    assert with_it.keys() - plain.keys() == {name for name in with_it if "abstention" in name}
    assert all(torch.equal(with_it[name], tensor) for name, tensor in plain.items())


def test_an_empty_part_never_abstains():
    assert Abstention(8, 4, 2).scores(torch.randn(3, 8)).tolist() == [0, 0, 0]
