"""Experts merged: what is exact is exact, what is not is measured, and what cannot be merged is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loramix import ConfigError, LoramixConfig, ModelError
from loramix.adapters.adapter import read_adapter
from loramix.adapters.lora import Lora, as_lora
from loramix.adapters.mixture import check_mixture, take_lora
from loramix.cli.main import run
from loramix.experiment import as_yaml, build
from loramix.lifecycle.merge_into_base import fold_in
from loramix.lifecycle.weighted_sum import concatenated, deviation, truncated
from loramix.models import load_base
from loramix.opening import load_adapter
from tests import tiny

WEIGHTS = {"red": 0.5, "green": 0.3, "blue": 1.7}


def made_run(folder: Path, method: str = "moa", dtype: str = "float32", **settings: object) -> Path:
    """A finished run on the tiny base, whose experts are random."""
    base = tiny.save_base(folder / "base")
    adapter = {"r": 4, "lora_alpha": 12, **settings}
    content = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(base),
        "dtype": dtype,
        "method": method,
        "data": {"domains": dict.fromkeys(tiny.EXPERTS)},
        "adapter": adapter,
    }
    experiment = build(content, where="a test", with_data=False).experiment
    torch.manual_seed(3)
    names = {"experts": tiny.EXPERTS} if method in ("moa", "lorahub") else {}
    config = LoramixConfig(method=method, init_lora_weights=False, **names, **adapter)
    model = get_peft_model(load_base(str(base), dtype=dtype), config)
    for name, parameter in model.named_parameters():
        if name.endswith("weights_E"):
            parameter.data = torch.tensor([0.7, -0.4, 1.1])
    model.save_pretrained(str(folder / "run" / "model"), save_embedding_layers=False)
    (folder / "run" / "config.yaml").write_text(as_yaml(experiment))
    return folder / "run"


@pytest.fixture(scope="module")
def moa_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("merge"))


def base_of(folder: Path) -> torch.nn.Module:
    return load_base(str(folder.parent / "base"))


def experts_of(folder: Path) -> dict[str, Lora]:
    adapter = read_adapter(folder / "model")
    config = check_mixture(adapter)
    return {name: take_lora(adapter, config, name) for name in config.experts}


def dense(lora: Lora) -> dict[str, torch.Tensor]:
    return {m: lora.scalings[m] * (b.double() @ a.double()) for m, (a, b) in lora.modules.items()}


def dense_sum(experts: dict[str, Lora], weights: dict[str, float]) -> dict[str, torch.Tensor]:
    parts = {name: dense(expert) for name, expert in experts.items()}
    return {m: sum(weights[n] * parts[n][m] for n in weights) for m in next(iter(parts.values()))}


def naive_deviation(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, float]:
    apart = {m: (found[m] - wanted[m]).norm().item() for m in wanted}
    size = {m: wanted[m].norm().item() for m in wanted}
    whole = sum(d * d for d in apart.values()) ** 0.5 / sum(s * s for s in size.values()) ** 0.5
    return whole, max(apart[m] / size[m] for m in wanted)


def logits(model: torch.nn.Module, **told: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny.ids(2, 9, vocab=200), **told).logits.float()


def words(weights: dict[str, float]) -> list[str]:
    return [f"{name}={weight}" for name, weight in weights.items()]


def merged(folder: Path, out: Path, *options: str) -> dict:
    assert run(["experts", "merge", str(folder), "--output-dir", str(out), *options]) == 0
    return json.loads((out / "merge_report.json").read_text())


# ---- the weighted sum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 5}], ids=str)
def test_the_concatenation_is_the_weighted_sum(tmp_path: Path, settings: dict):
    folder = made_run(tmp_path, **settings)
    experts = experts_of(folder)
    wanted = dense_sum(experts, WEIGHTS)
    exact = dense(concatenated(experts, WEIGHTS))
    assert max((exact[m] - wanted[m]).norm() / wanted[m].norm() for m in wanted) <= 1e-12
    report = merged(folder, tmp_path / "out", "--weights", *words(WEIGHTS))
    assert report["rank"] == 12
    assert report["exact_up_to_rounding"]
    assert report["weights"] == WEIGHTS
    assert 0 < report["relative_error"]["worst"] <= 1e-7  # one rounding to fp32
    stock = PeftModel.from_pretrained(base_of(folder), str(tmp_path / "out"))
    assert not any("loramix" in type(module).__module__ for module in stock.modules())
    by_hand = base_of(folder)
    for module, delta in wanted.items():
        by_hand.get_submodule(module).weight.data += delta.float()
    assert (logits(stock) - logits(by_hand)).abs().max() <= 1e-5
    assert (logits(stock) - logits(base_of(folder))).abs().max() > 1e-2
    downs = read_adapter(tmp_path / "out").tensors
    for module, (down_RI, _) in experts["red"].modules.items():
        assert torch.equal(downs[f"{module}.lora_A.weight"][:4], down_RI)


def test_an_expert_of_weight_0_takes_no_rank(moa_run: Path, tmp_path: Path):
    assert merged(moa_run, tmp_path / "out", "--weights", "red=1", "blue=0")["rank"] == 4


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_error_of_the_nearest_of_a_rank_is_that_of_dense_matrices(moa_run: Path, tmp_path: Path, rank: int):
    report = merged(moa_run, tmp_path / "out", "--rank", str(rank), "--weights", *words(WEIGHTS))
    wanted = dense_sum(experts_of(moa_run), WEIGHTS)
    found = as_lora(read_adapter(tmp_path / "out"))
    assert found.rank == report["rank"] == rank
    assert not report["exact_up_to_rounding"]
    overall, worst = naive_deviation(dense(found), wanted)
    assert report["relative_error"]["overall"] == pytest.approx(overall, rel=1e-6)
    assert report["relative_error"]["worst"] == pytest.approx(worst, rel=1e-6)
    left = [torch.linalg.svdvals(delta)[rank:] for delta in wanted.values()]
    least = sum(float((one**2).sum()) for one in left) ** 0.5
    assert overall == pytest.approx(least / sum(float(d.norm() ** 2) for d in wanted.values()) ** 0.5, rel=1e-5)


def test_a_rank_beyond_a_module_is_filled_up():
    torch.manual_seed(0)
    pair = (torch.randn(20, 5, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64))
    lora = Lora({"m": pair}, {"m": 1.0}, (20, 20.0, False), None, "here")
    short = truncated(lora, 8)
    assert short.modules["m"][0].shape == (8, 5)
    assert deviation(short, lora).overall <= 1e-12


def test_learned_weights_of_lorahub_are_the_mixture(tmp_path: Path):
    folder = made_run(tmp_path, "lorahub")
    report = merged(folder, tmp_path / "out", "--weights", "learned")
    assert report["rank"] == 4
    assert report["exact_up_to_rounding"]
    stock = PeftModel.from_pretrained(base_of(folder), str(tmp_path / "out"))
    assert (logits(stock) - logits(load_adapter(base_of(folder), folder / "model"))).abs().max() <= 1e-5


# ---- PEFT's own ways -------------------------------------------------------------------------------------------------

WAYS = {
    "linear": None,
    "ties": 0.4,
    "dare_linear": 0.5,
    "dare_ties": 0.5,
    "magnitude_prune": 0.3,
    "ties_svd": 0.4,
    "dare_linear_svd": 0.5,
}


@pytest.mark.parametrize("kind", WAYS)
def test_ties_and_dare_are_pefts(moa_run: Path, tmp_path: Path, kind: str):
    density = WAYS[kind]
    options = [] if density is None else ["--density", str(density)]
    if kind.startswith("dare"):
        options += ["--seed", "5"]
    report = merged(moa_run, tmp_path / "out", "--combination", kind, *options, "--weights", *words(WEIGHTS))
    assert run(["export", str(moa_run), "-o", str(tmp_path / "export")]) == 0
    theirs = PeftModel.from_pretrained(base_of(moa_run), str(tmp_path / "export" / "red"), adapter_name="red")
    for name in ("green", "blue"):
        theirs.load_adapter(str(tmp_path / "export" / name), adapter_name=name)
    torch.manual_seed(5)
    how = {"combination_type": kind, "density": density, "svd_full_matrices": False}
    theirs.base_model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "all", **how)
    theirs.set_adapter("all")
    ours = PeftModel.from_pretrained(base_of(moa_run), str(tmp_path / "out"))
    apart = (logits(ours) - logits(theirs)).abs().max()
    assert apart <= 1e-5 if kind.endswith("_svd") else apart == 0
    overall, worst = naive_deviation(
        dense(as_lora(read_adapter(tmp_path / "out"))), dense_sum(experts_of(moa_run), WEIGHTS)
    )
    assert overall > 0.01
    assert report["relative_error"]["overall"] == pytest.approx(overall, rel=1e-6)
    assert report["relative_error"]["worst"] == pytest.approx(worst, rel=1e-6)
    assert not report["exact_up_to_rounding"]


def test_the_same_seed_prunes_the_same(moa_run: Path, tmp_path: Path):
    how = ("--combination", "dare_linear", "--density", "0.5", "--weights", *words(WEIGHTS))
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        merged(moa_run, tmp_path / out, "--seed", seed, *how)
    a, b, c = (read_adapter(tmp_path / out).fingerprint() for out in "abc")
    assert a == b != c


def test_rslora_reaches_peft_with_its_true_scaling(tmp_path: Path):
    folder = made_run(tmp_path, use_rslora=True)
    one = {"red": 1.0, "green": 1e-12}
    report = merged(folder, tmp_path / "out", "--combination", "linear", "--weights", *words(one))
    assert report["relative_error"]["overall"] <= 1e-4


# ---- into the base ---------------------------------------------------------------------------------------------------


def test_a_merged_model_is_the_pinned_expert_and_needs_neither_peft_nor_loramix(moa_run: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    report = merged(moa_run, out, "--expert", "green")
    assert "pinned to green" in capsys.readouterr().out
    assert report["answers"]["largest_difference"] <= 1e-5
    assert report["answers"]["same_next_token"] == 1.0
    assert 0 < report["rounding"]["overall"] <= 1e-5
    code = (
        "import sys; sys.modules['peft'] = None; sys.modules['loramix'] = None\n"
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}).eval()\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})\n"
        "assert tokenizer.chat_template\n"
        f"ids = torch.tensor({tiny.ids(2, 9, vocab=200).tolist()})\n"
        f"torch.save(model(ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    plain = torch.load(tmp_path / "logits.pt", weights_only=True)
    pinned = load_adapter(base_of(moa_run), moa_run / "model")
    assert (plain - logits(pinned, domain_ids=torch.tensor([1, 1]))).abs().max() <= 1e-5


def test_a_weighted_sum_goes_into_the_base(moa_run: Path, tmp_path: Path):
    report = merged(moa_run, tmp_path / "model", "--into-base", "--weights", *words(WEIGHTS))
    merged(moa_run, tmp_path / "lora", "--weights", *words(WEIGHTS))
    beside = PeftModel.from_pretrained(base_of(moa_run), str(tmp_path / "lora"))
    assert (logits(load_base(str(tmp_path / "model"))) - logits(beside)).abs().max() <= 1e-5
    assert report["answers"]["largest_difference"] <= 1e-5


def test_a_run_of_one_expert_goes_into_the_base(tmp_path: Path):
    folder = made_run(tmp_path, "lora")
    report = merged(folder, tmp_path / "out", "--expert", "default")
    wanted = logits(load_adapter(base_of(folder), folder / "model"))
    assert (logits(load_base(str(tmp_path / "out"))) - wanted).abs().max() <= 1e-5
    assert report["answers"]["beside"] == "the same LoRA beside the base, by PEFT"


def test_export_merged_is_the_same_and_json_is_the_report(moa_run: Path, tmp_path: Path, capsys):
    capsys.readouterr()
    how = ["--format", "merged", "--expert", "blue", "--json"]
    assert run(["export", str(moa_run), "-o", str(tmp_path / "out"), *how]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert said["weights"] == {"blue": 1.0}
    assert said["environment"]["packages"]["peft"]


def test_rounding_to_bf16_is_measured(tmp_path: Path):
    folder = made_run(tmp_path, dtype="bfloat16")
    report = merged(folder, tmp_path / "out", "--expert", "red")
    base, found = (
        load_base(str(tmp_path / "base"), dtype="bfloat16"),
        load_base(str(tmp_path / "out"), dtype="bfloat16"),
    )
    wanted = dense(experts_of(folder)["red"])
    change = {m: found.get_submodule(m).weight.double() - base.get_submodule(m).weight.double() for m in wanted}
    overall, worst = naive_deviation(change, wanted)
    assert report["rounding"]["overall"] == pytest.approx(overall, rel=1e-6)
    assert report["rounding"]["worst"] == pytest.approx(worst, rel=1e-6)
    assert 1e-4 < report["rounding"]["relative_to_the_weights"] < 0.004


def test_tied_and_foreign_modules_are_refused():
    base = tiny.llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    pair = (torch.ones(1, 32), torch.ones(64, 1))
    lora = Lora({"lm_head": pair, "nowhere": pair}, {"lm_head": 1.0, "nowhere": 1.0}, (1, 1.0, False), None, "here")
    with pytest.raises(ModelError, match=r"2 problems(.|\n)*shares its weights with model.embed_tokens(.|\n)*nowhere"):
        fold_in(base, lora)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_chosen_is_refused_with_the_choices(moa_run: Path, capsys):
    assert run(["experts", "merge", str(moa_run)]) == 2
    said = capsys.readouterr().err
    assert "depends on the input" in said
    for choice in ("--expert NAME", "red, green, blue", "--weights", "--rank R", "--combination", "--into-base"):
        assert choice in said


WRONG = {
    "unknown expert": (["--expert", "gren"], ["no such expert", 'Did you mean "green"']),
    "unknown weight": (["--weights", "red=1", "grey=1"], ["'grey': no such expert"]),
    "negative and NaN": (["--weights", "red=-1", "blue=nan"], ["red=-1", "blue=nan", "2 problems"]),
    "no numbers": (["--weights", "red=x", "blue"], ["'red=x'", "'blue'", "2 problems"]),
    "all zero": (["--weights", "red=0"], ["bare base"]),
    "both": (["--expert", "red", "--weights", "red=1"], ["contradict"]),
    "learned": (["--weights", "learned"], ["no constant weights"]),
    "rank too large": (["--weights", "red=1", "blue=1", "--rank", "8"], ["exact at rank 8"]),
    "many": (
        ["--weights", "red=1", "--rank", "0", "--combination", "tie", "--seed", "3"],
        ["--rank 0", 'Did you mean "ties"', "needs two experts", "3 problems"],
    ),
    "no density": (["--weights", "red=1", "blue=1", "--combination", "ties"], ["needs --density"]),
    "density": (["--weights", "red=1", "blue=1", "--combination", "ties", "--density", "1.5"], ["--density 1.5"]),
    "density of a sum": (["--weights", "red=1", "blue=1", "--density", "0.5"], ["nothing is pruned"]),
    "rank of ties": (
        ["--weights", "red=1", "blue=1", "--combination", "ties", "--density", "0.5", "--rank", "2"],
        ["ties_svd"],
    ),
    "rank of one expert": (["--expert", "red", "--rank", "2"], ["--rank: is for --weights"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_choices_are_refused(moa_run: Path, tmp_path: Path, capsys, case: str):
    options, expected = WRONG[case]
    assert run(["experts", "merge", str(moa_run), "-o", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    for part in expected:
        assert part in said
    assert not (tmp_path / "out").exists()


def test_a_full_folder_and_a_missing_one_are_refused(moa_run: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(["experts", "merge", str(moa_run), "-o", str(tmp_path), "--expert", "red"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(["experts", "merge", str(moa_run), "--expert", "red"]) == 2
    assert "--output-dir: is missing" in capsys.readouterr().err


def test_experts_that_are_not_whole_are_refused(tmp_path: Path, capsys):
    folder = made_run(tmp_path, "mosld")
    assert run(["experts", "merge", str(folder), "-o", str(tmp_path / "out"), "--expert", "expert_0"]) == 2
    assert "shares matrices between experts" in capsys.readouterr().err


# ---- PEFT's merge of an adapter that routes nothing ------------------------------------------------------------------


def single(base: torch.nn.Module, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, LoramixConfig(method="lora", r=4, init_lora_weights=False, **settings)).eval()


def small_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


BASES = {"llama": tiny.llama, "gpt2 (Conv1D)": tiny.gpt2}


@pytest.mark.parametrize("base", BASES)
def test_one_expert_merges_and_comes_out_again(base: str):
    model = single(BASES[base](), lora_dropout=0.5)
    wanted, bare = small_logits(model), small_logits(BASES[base]())
    assert (wanted - bare).abs().max() > 1e-3
    model.merge_adapter()
    assert (small_logits(model) - wanted).abs().max() <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()  # already there; not a second time
    assert (small_logits(model) - wanted).abs().max() <= 1e-5
    assert (small_logits(model.train().eval()) - wanted).abs().max() <= 1e-5
    model.unmerge_adapter()
    assert (small_logits(model) - wanted).abs().max() <= 1e-5
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert (small_logits(model) - bare).abs().max() <= 1e-5
    assert (small_logits(model) - wanted).abs().max() <= 1e-5
    plain = model.merge_and_unload()
    assert type(plain) is type(BASES[base]())
    assert not any("loramix" in name for name, _ in plain.named_modules())
    assert (small_logits(plain) - wanted).abs().max() <= 1e-5


def test_it_merges_as_pefts_lora_does():
    ours = single(tiny.llama(), lora_alpha=12)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny.llama(), config)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            bank = ours.get_submodule(name).bank("default")
            module.lora_A["default"].weight.data = bank.A_ERI[0].detach().clone()
            module.lora_B["default"].weight.data = bank.B_EOR[0].detach().clone()
    found, wanted = (model.merge_and_unload().state_dict() for model in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all((found[name] - wanted[name]).abs().max() <= 1e-6 for name in wanted)


def test_safe_merge_finds_nan_and_changes_nothing():
    model = single(tiny.llama())
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.bank("default").B_EOR.data[0, 0, 0] = float("nan")
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ModelError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


@pytest.mark.parametrize("method", ["moa", "mixlora"])
def test_a_routed_adapter_is_refused_before_anything_changes(method: str):
    names = {"experts": tiny.EXPERTS} if method == "moa" else {}
    model = get_peft_model(tiny.llama(), LoramixConfig(method=method, init_lora_weights=False, **names)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for way in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"depends on its input(.|\n)*loramix experts merge"):
            way()
    with pytest.raises(ConfigError, match="depends on its input"):
        model.merge_adapter(adapter_names=["default"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Quantised(torch.nn.Linear):
    """Stands for a layer whose weights are not what its product uses."""


def test_quantised_weights_are_refused_before_anything_changes():
    base = tiny.llama()
    last = base.model.layers[-1].mlp
    last.down_proj.__class__ = Quantised
    model = single(base)
    first = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").get_base_layer()
    before = first.weight.clone()
    with pytest.raises(ConfigError, match="down_proj is a Quantised"):
        model.merge_adapter()
    assert torch.equal(first.weight, before)
