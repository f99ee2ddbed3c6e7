"""The plan is the real step without numbers: its parameters, its FLOPs, what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from typer.testing import CliRunner

from loramix import LoramixConfig
from loramix.cli.main import app
from loramix.data.collation import Example
from loramix.data.padding_free import PaddingFreeCollator
from loramix.data.prompts import Encoded
from loramix.errors import ConfigError
from loramix.models.segment_attention import segment_attention
from loramix.planning.dry_run import dry_run
from loramix.planning.flops import counting
from loramix.planning.plan import largest_part
from loramix.segments import BORDERS
from loramix.training.settings import TrainingSettings
from loramix.training.supervised_loss import SupervisedLoss
from tests import ended, tiny
from tests import method_cases as cases

LENGTH, PROMPT = 48, 20


MANY = {"r": 8, "num_experts": 32, "backend": "grouped"}


def _built(method: str, device: str, **other: Any) -> Any:
    with torch.device(device):
        base = tiny.llama(vocab=256, hidden=64, layers=4)
    if method == "moa":
        return tiny.moa(base, lora_dropout=0.0).train()
    given = {"r": 4, "lora_dropout": 0.0, **cases.CASES[method].settings}
    if other:
        given = {name: value for name, value in given.items() if name not in ("experts", "allocation")} | other
    return get_peft_model(base, LoramixConfig(method=method, **given)).train()


def _real(method: str, **other: Any) -> dict[str, int]:
    """What a true step of the same row counts."""
    model = _built(method, "cpu", **other)
    batch = PaddingFreeCollator()([Example(Encoded([5] * LENGTH, [i >= PROMPT for i in range(LENGTH)], PROMPT), 0)])
    kept = {"input_ids", "position_ids", *BORDERS, *([] if method != "moa" else ["domain_ids", "prompt_mask"])}
    asked = {name: value for name, value in batch.items() if name in kept}
    loss = SupervisedLoss(model, 8)
    with segment_attention(model):
        loss(model, asked, batch)  # the head is tried
        seen = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
        held: list[Any] = []

        def keep(tensor: Tensor) -> Tensor:
            held.append(tensor.untyped_storage())
            seen.setdefault(held[-1].data_ptr(), held[-1].nbytes())
            return tensor

        with counting() as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            nll_B, _ = loss(model, asked, batch)
            nll_B.sum().backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "flops": counter.get_total_flops() - attention,
        "kept_bytes": sum(seen.values()),
    }


@pytest.mark.parametrize(
    ("method", "other"),
    [*((name, {}) for name in ("lora", "moa", "mosld", "mola", "mixlora")), ("molora", MANY), ("mixlora", MANY)],
)
def test_a_dry_run_counts_what_a_step_counts(method: str, other: dict[str, Any]):
    real = _real(method, **other)
    dry = dry_run(_built(method, "meta", **other), LENGTH, LENGTH - PROMPT, 0, 8, told=method == "moa", by_row=True)
    assert (dry.parameters, dry.trained) == (real["parameters"], real["trained"])
    assert dry.flops == pytest.approx(real["flops"], rel=0.01), "attention left out on both sides"
    # Without borders moa's experts are gathered for the row, which keeps one expert's weights again: little beside the
    # tokens of a true base.
    assert dry.kept_bytes == pytest.approx(real["kept_bytes"], rel=0.07 if method == "moa" else 0.01)


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
    short, long = (dry_run(_built("lora", "meta"), 64, 32, row, 8, told=False).flops for row in (16, 32))
    of_token = 4 * 64 * 4 // 2 * 3.5  # two products by heads x width, four layers, causal; backward 2.5 times
    assert long - short == pytest.approx(64 * 16 * of_token)


def test_prompts_read_ahead_are_not_read_in_the_step():
    each, ahead = (
        dry_run(_built("moa", "meta"), LENGTH, LENGTH - PROMPT, 0, 8, told=True, ahead=known) for known in (False, True)
    )
    linears = [
        m for m in tiny.llama(vocab=256, hidden=64, layers=4).model.layers.modules() if hasattr(m, "in_features")
    ]
    once = sum(2 * linear.weight.numel() for linear in linears)
    read = (each.flops - ahead.flops) / PROMPT
    assert read == 3 / 4 * once, "the base's products for each token of a prompt, up to the last layer's router"


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
        dry_run(model, LENGTH, 4, 8, 8, told=False)


def test_the_command_says_what_training_will_take(tmp_path: Path):
    content = {**ended.settings(tmp_path, "moa"), "output_dir": str(tmp_path / "run")}
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    said = CliRunner().invoke(app, ["validate", str(file), "--plan", "--json"])
    assert said.exit_code == 0, said.output
    stages = json.loads(said.stdout)["plan"]
    assert [stage["stage"].split()[-1] for stage in stages] == ["another", "joint"]
    assert all(stage["seconds"] > 0 and stage["tokens"] > 0 for stage in stages)
    once = _flops_per_token(file, "joint_stage.num_train_epochs=1", "joint_stage.max_steps=-1")
    often = _flops_per_token(file, "joint_stage.num_train_epochs=9", "joint_stage.max_steps=-1")
    in_each = _flops_per_token(
        file, "joint_stage.num_train_epochs=9", "joint_stage.max_steps=-1", "joint_stage.read_ahead=false"
    )
    assert often < once == in_each
    said = CliRunner().invoke(app, ["validate", str(file), "--plan", "--json", "experts_together=true"])
    together = json.loads(said.stdout)["plan"][0]
    assert together["stage"] == "3 experts, together"
    assert together["trained"] == 3 * stages[0]["trained"], "all experts, no routers"
    assert together["tokens"] == stages[0]["tokens"]
    shown = CliRunner().invoke(app, ["validate", str(file), "--plan"])
    assert "MFLOP" in shown.output
    wrong = CliRunner().invoke(app, ["validate", str(file), "--plan", "adapter.r=0", "training.seed=-1"])
    assert wrong.exit_code != 0


def _flops_per_token(file: Path, *overrides: str) -> int:
    said = CliRunner().invoke(app, ["validate", str(file), "--plan", "--json", *overrides])
    assert said.exit_code == 0, said.output
    found: int = json.loads(said.stdout)["plan"][-1]["flops_per_token"]
    return found
