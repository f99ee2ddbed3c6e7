"""The plan is the real step without numbers: its parameters, its FLOPs, what it keeps."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from typer.testing import CliRunner

from loramix import LoramixConfig
from loramix.cli.main import app
from loramix.cli.validate import planned as planned_stages
from loramix.data.collation import Example
from loramix.data.padding_free import PaddingFreeCollator
from loramix.data.prompts import Encoded
from loramix.errors import ConfigError
from loramix.experiment import build
from loramix.planning import pace, timed_steps
from loramix.planning.dry_run import DryRun, LongRow, dry_run
from loramix.planning.dry_step import DryStep
from loramix.planning.flops import counting
from loramix.planning.layers_again import checkpoint_layers
from loramix.planning.plan import largest_part, memory
from loramix.segments import BORDERS
from loramix.training.settings import TrainingSettings
from loramix.training.supervised_loss import SupervisedLoss
from loramix.training.while_learning import while_learning
from tests import ended, tiny
from tests import method_cases as cases

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LENGTH, PROMPT, CHUNK = 96, 40, 8

MANY = {"r": 8, "num_experts": 32, "backend": "grouped"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is timed once; memory is measured as the benchmarks do it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(timed_steps, "MOST", 2)
    monkeypatch.setattr(pace, "TURNS", 1)


def _built(method: str, device: str, **other: Any) -> Any:
    with torch.device(device):
        base = tiny.llama(vocab=256, hidden=64, layers=4)
    if method == "moa":
        return tiny.moa(base, lora_dropout=0.0).train()
    given = {"r": 4, "lora_dropout": 0.0, **cases.CASES[method].settings}
    if other:
        given = {name: value for name, value in given.items() if name not in ("experts", "allocation")} | other
    return get_peft_model(base, LoramixConfig(method=method, **given)).train()


def _real(model: Any, told: bool, settings: TrainingSettings) -> dict[str, int]:
    """What a true step of the same row counts."""
    from tensor_peak import MIB, tensor_peak

    batch = PaddingFreeCollator()([Example(Encoded([5] * LENGTH, [i >= PROMPT for i in range(LENGTH)], PROMPT), 0)])
    kept = {"input_ids", "position_ids", *BORDERS, *(["domain_ids", "prompt_mask"] if told else [])}
    asked = {name: value for name, value in batch.items() if name in kept}
    if settings.bf16:  # as accelerate prepares a model
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    loss = SupervisedLoss(model, CHUNK)

    def step() -> None:
        nll_B, _ = loss(model, asked, batch)
        taught = [routing.logits.sum() for routing in model.routings.values()] if told else []
        torch.autograd.backward([nll_B.sum(), *taught])
        model.zero_grad()

    with while_learning(model, settings, apart=True):
        step()  # the head is tried
        with counting() as counter:
            step()
        gc.collect()  # what the counter left in cycles of references would be freed in the step, and lower its peak
        peak = tensor_peak(step) * MIB
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops": counter.get_total_flops() - attention,
        "peak": round(peak),
    }


def _planned(model: Any, settings: TrainingSettings) -> tuple[DryRun, int]:
    """The same row on shapes alone, and its bytes at the peak."""
    dry = DryStep(settings, LongRow(LENGTH, LENGTH - PROMPT, 0, CHUNK, apart=True, bf16=settings.bf16))(model)
    return dry, memory(dry, model, settings, LENGTH, 1 - PROMPT / LENGTH, several=False)["activations"]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "run again"])
@pytest.mark.parametrize(
    ("method", "other"),
    [*((name, {}) for name in ("lora", "moa", "mosld", "mola", "mixlora")), ("molora", MANY), ("mixlora", MANY)],
)
def test_a_dry_run_counts_what_a_step_counts(method: str, other: dict[str, Any], again: bool):
    settings = TrainingSettings(head_chunk=CHUNK, activation_checkpointing=again)
    true, shapes = _built(method, "cpu", **other), _built(method, "meta", **other)
    for model in (true, shapes):
        checkpoint_layers(model, settings)
    real = _real(true, method == "moa", settings)
    dry, peak = _planned(shapes, settings)
    assert (dry.parameters, dry.trained) == (real["parameters"], real["trained"])
    assert dry.flops == pytest.approx(real["flops"], rel=0.01), "attention left out on both sides"
    assert (dry.flops > 1.3 * _once(method, other)) == again
    assert peak == pytest.approx(real["peak"], rel=0.05 if method == "moa" else 0.03)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "run again"])
@pytest.mark.parametrize("halves", [False, True], ids=["base in fp32", "base in bf16"])
@pytest.mark.parametrize("method", ["lora", "moa", "mola", "mixlora"])
def test_a_dry_run_in_autocast_holds_what_a_step_holds(method: str, halves: bool, again: bool):
    settings = TrainingSettings(head_chunk=CHUNK, activation_checkpointing=again, bf16=True)
    true, shapes = _built(method, "cpu"), _built(method, "meta")
    for model in (true, shapes):
        if halves:
            tiny.in_halves(model)
        checkpoint_layers(model, settings)
    real = _real(true, method == "moa", settings)
    dry, peak = _planned(shapes, settings)
    assert dry.flops == pytest.approx(real["flops"], rel=0.01)
    assert peak == pytest.approx(real["peak"], rel=0.1)


def _once(method: str, other: dict[str, Any]) -> int:
    """FLOPs where no layer runs again."""
    return _planned(_built(method, "meta", **other), TrainingSettings(head_chunk=CHUNK))[0].flops


def test_gradients_that_are_there_are_not_held_twice():
    model = _built("molora", "meta", **MANY)
    first, later = (dry_run(model, LongRow(4, 2, 0, CHUNK), later=there) for there in (False, True))
    assert first.flops == later.flops
    assert first.peak_bytes > 4 * first.trained > 2 * later.peak_bytes, "its own gradients, one at a time"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_second_layer_runs_again():
    flops = []
    for kwargs in ({"every_n_layers": 2}, {}):
        model = _built("lora", "meta")
        checkpoint_layers(
            model, TrainingSettings(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
        )
        flops.append(_planned(model, TrainingSettings())[0].flops - _once("lora", {}))
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.1)


def test_a_base_whose_layers_cannot_run_again_is_a_line():
    model = _built("lora", "meta")
    model.get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"activation_checkpointing: this base.*Leave it out"):
        checkpoint_layers(model, TrainingSettings(activation_checkpointing=True))


def test_what_is_counted_by_hand():
    x, W, A, B = torch.randn(6, 8), torch.randn(16, 8), torch.randn(4, 8, 12), torch.randn(16, 12)
    ends = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    heads = torch.randn(1, 2, 6, 4, requires_grad=True)
    with counting() as counter:
        F.grouped_mm(x, A, offs=ends)
    assert counter.get_total_flops() == 2 * 6 * 8 * 12
    with counting() as counter:
        F.grouped_mm(x.T, torch.randn(6, 12), offs=ends)
    assert counter.get_total_flops() == 2 * 6 * 8 * 12
    with counting() as counter:
        (x @ W.T).addmm_(torch.randn(6, 12), B.T)
    assert counter.get_total_flops() == 2 * 6 * 8 * 16 + 2 * 6 * 12 * 16
    with counting() as counter:
        F.scaled_dot_product_attention(heads, heads, heads).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 6 * 6 * 4


def test_attention_grows_with_the_rows_not_with_the_batch():
    short, long = (dry_run(_built("lora", "meta"), LongRow(64, 32, row, 8)).flops for row in (16, 32))
    of_token = 4 * 64 * 4 // 2 * 3.5  # two products by heads x width, four layers, causal; backward 2.5 times
    assert long - short == pytest.approx(64 * 16 * of_token)


def test_prompts_read_ahead_are_not_read_in_the_step():
    each, ahead = (
        dry_run(_built("moa", "meta"), LongRow(LENGTH, LENGTH - PROMPT, 0, 8), ahead=known) for known in (False, True)
    )
    linears = [
        m for m in tiny.llama(vocab=256, hidden=64, layers=4).model.layers.modules() if hasattr(m, "in_features")
    ]
    once = sum(2 * linear.weight.numel() for linear in linears)
    read = (each.flops - ahead.flops) / PROMPT
    assert read == pytest.approx(3 / 4 * once, rel=1e-3), (
        "the base's products for each token of a prompt, up to the last layer's router"
    )


@pytest.mark.parametrize(
    ("bound", "batch", "longest", "wanted"), [(0, 4, 100, 400), (250, 4, 100, 250), (50, 4, 100, 100), (250, 1, 9, 9)]
)
def test_the_largest_part(bound: int, batch: int, longest: int, wanted: int):
    settings = TrainingSettings(tokens_at_once=bound, per_device_train_batch_size=batch)
    assert largest_part(settings, longest) == wanted


def test_a_base_that_needs_numbers_is_a_line():
    model = _built("lora", "meta")
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda _, __, out: out * float(out.sum()))
    with pytest.raises(ConfigError, match="does not run on shapes alone"):
        dry_run(model, LongRow(LENGTH, 4, 8, 8))


def test_the_command_says_what_training_will_take(tmp_path: Path):
    content = {**ended.settings(tmp_path, "moa"), "output_dir": str(tmp_path / "run")}
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    said = CliRunner().invoke(app, ["validate", str(file), "--plan", "--json"])
    assert said.exit_code == 0, said.output
    stages = json.loads(said.stdout)["plan"]
    names = ["3 experts, one after another", "control single_long: 3 experts, each trained on alone"]
    assert [stage["stage"] for stage in stages] == [*names, "control mixed: one LoRA on all domains", "joint"]
    assert all(stage["seconds"] > 0 and stage["tokens"] > 0 and stage["note"] == "" for stage in stages)
    once = _flops_per_token(file, "joint_stage.num_train_epochs=1", "joint_stage.max_steps=-1")
    often = _flops_per_token(file, "joint_stage.num_train_epochs=9", "joint_stage.max_steps=-1")
    in_each = _flops_per_token(
        file, "joint_stage.num_train_epochs=9", "joint_stage.max_steps=-1", "joint_stage.read_ahead=false"
    )
    assert often < once == in_each
    said = CliRunner().invoke(app, ["validate", str(file), "--plan", "--json", "experts_together=true", "controls=[]"])
    together = json.loads(said.stdout)["plan"][0]
    assert together["stage"] == "3 experts, together"
    assert together["trained"] == 3 * stages[0]["trained"], "all experts, no routers"
    assert together["tokens"] == stages[0]["tokens"]
    said = CliRunner().invoke(
        app, ["validate", str(file), "--plan", "--json", "training.activation_checkpointing=true"]
    )
    again = json.loads(said.stdout)["plan"]
    for one, other in zip(stages, again, strict=True):
        assert other["flops_per_token"] > one["flops_per_token"]
        assert other["memory_bytes"]["activations"] < one["memory_bytes"]["activations"]
    shown = CliRunner().invoke(app, ["validate", str(file), "--plan", "controls=[]"])
    assert "MFLOP each" in shown.output
    assert "MiB at the peak: weights " in shown.output
    assert "all training: " in shown.output
    wrong = CliRunner().invoke(app, ["validate", str(file), "--plan", "adapter.r=0", "training.seed=-1"])
    assert wrong.exit_code != 0


def _flops_per_token(file: Path, *overrides: str) -> int:
    said = CliRunner().invoke(app, ["validate", str(file), "--plan", "--json", "controls=[]", *overrides])
    assert said.exit_code == 0, said.output
    found: int = json.loads(said.stdout)["plan"][-1]["flops_per_token"]
    return found


@pytest.mark.parametrize(
    ("method", "controls", "changed"),
    [
        ("moa", ["single_long", "mixed"], {"data": {"mixing": "uniform", "max_train_examples": {"adds": 12}}}),
        ("mola", ["mixed"], {}),
        ("full", ["mixed"], {}),  # only the control has experts
        ("lora", [], {"expert_stage": {"num_train_epochs": 2}}),
    ],
)
def test_a_run_learns_the_tokens_of_its_plan(
    tmp_path: Path, method: str, controls: list[str], changed: dict[str, dict[str, Any]]
):
    content = {**ended.settings(tmp_path, method, max_steps=-1, num_train_epochs=1), "controls": controls}
    content |= {name: {**content.get(name, {}), **values} for name, values in changed.items()}
    experiment = build({**content, "output_dir": str(tmp_path / "run")}).experiment
    planned = planned_stages(experiment)
    seen = ended.train(content, tmp_path / "run")["stages"]
    joined: dict[str, int] = {}
    for name, stage in seen.items():
        kind = {"expert": "3", "longer": "control single_long:", "mixed": "control mixed:"}.get(
            name.split()[0], "joint"
        )
        kind = "joint" if method == "lora" else kind  # the method is what the control would be
        joined[kind] = joined.get(kind, 0) + stage["tokens"]
    if method == "full":
        del joined["joint"]
    assert len(planned) == len(joined)
    for one, (kind, tokens) in zip(planned, sorted(joined.items(), key=lambda item: _order(item[0])), strict=True):
        assert one.stage.startswith(kind)
        assert one.tokens == pytest.approx(tokens, rel=0.02)


def _order(kind: str) -> int:
    return ["3", "control single_long:", "control mixed:", "joint"].index(kind)
