"""Training: accumulation changes nothing, routing loss falls, the right things train, the log tells what happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loramix.data.collation import Collator, Example
from loramix.data.prompts import Encoded
from loramix.training.arguments import training_arguments
from loramix.training.settings import TrainingSettings
from loramix.training.stages import train_stage
from loramix.training.trainer import MixtureTrainer
from tests import tiny

SETTINGS = TrainingSettings(
    max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant"
)


def _examples(count: int = 4) -> list[Example]:
    """Rows of different lengths, prompts and labels."""
    made = torch.Generator().manual_seed(3)
    examples = []
    for number in range(count):
        length, prompt = 6 + number, 2 + number % 3
        domain = number % 3
        tokens = torch.randint(3 + 20 * domain, 23 + 20 * domain, (length,), generator=made).tolist()
        examples.append(Example(Encoded(tokens, [i >= prompt for i in range(length)], prompt), domain))
    return examples


def _gradients(tmp_path: Path, rows: int, accumulation: int, **router: str) -> dict[str, torch.Tensor]:
    model = tiny.moa(router=router)
    settings = replace(SETTINGS, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
    trainer = MixtureTrainer(
        model,
        settings=settings,
        domains=tiny.EXPERTS,
        auxiliary={"routing_cross_entropy": 0.1},
        args=training_arguments(settings, str(tmp_path)),
        train_dataset=_examples(),
        data_collator=Collator(tiny.PAD),
    )
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return kept


@pytest.mark.parametrize("reads", ["base", "experts"])
def test_accumulation_one_by_four_is_four_by_one(tmp_path, reads):
    together = _gradients(tmp_path, 4, 1, reads=reads)
    apart = _gradients(tmp_path, 1, 4, reads=reads)
    assert together.keys() == apart.keys()
    assert any("router" in name for name in together)
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_loss_is_the_plain_definition():
    """Sum of NLL over tokens plus eta times the mean routing loss over rows, from one unpadded row at a time."""
    model = tiny.moa().train()
    examples = _examples()
    nll, tokens, routing = 0.0, 0, 0.0
    for example in examples:
        ids = torch.tensor([example.encoded.input_ids])
        label = torch.tensor([example.domain_id])
        prompt = torch.tensor([[i < example.encoded.prompt_length for i in range(example.length)]])
        logits = model(input_ids=ids, domain_ids=label, prompt_mask=prompt).logits.log_softmax(-1)
        for t in range(1, example.length):
            if example.encoded.supervised[t]:
                nll -= logits[0, t - 1, ids[0, t]].item()
                tokens += 1
        by_layer = [torch.nn.functional.cross_entropy(r.logits, label).item() for r in model.routings.values()]
        routing += sum(by_layer) / len(by_layer)
    settings = SETTINGS
    trainer = MixtureTrainer(
        model,
        settings=settings,
        domains=tiny.EXPERTS,
        auxiliary={"routing_cross_entropy": 0.3},
        args=training_arguments(settings, "unused"),
        train_dataset=examples,
        data_collator=Collator(tiny.PAD),
    )
    batch = Collator(tiny.PAD)(examples)
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert trainer.compute_loss(model, batch).item() == pytest.approx(nll / tokens + 0.3 * routing / 4, rel=1e-5)


def _stage(tmp_path: Path, model, steps: int, **settings: object) -> dict:
    with (tmp_path / "screen.txt").open("w") as screen:
        return _stage_on(screen, tmp_path, model, steps, settings)


def _stage_on(screen, tmp_path: Path, model, steps: int, settings: dict) -> dict:
    return train_stage(
        model,
        {name: [e for e in _examples(24) if e.domain_id == i] for i, name in enumerate(tiny.EXPERTS)},
        domains=tiny.EXPERTS,
        title="joint",
        settings=replace(SETTINGS, max_steps=steps, learning_rate=1e-3, logging_steps=10, **settings),
        shares=dict.fromkeys(tiny.EXPERTS, 1 / 3),
        pad_token_id=tiny.PAD,
        output_dir=tmp_path,
        log_file=tmp_path / "log.jsonl",
        console=Console(file=screen, width=200),
        auxiliary={"routing_cross_entropy": 0.1},
    )


def test_stage_two_lowers_the_routing_loss_and_logs_it(tmp_path):
    model = tiny.moa(router={"pooling": "mean"})
    _stage(tmp_path, model, 80, router_learning_rate=3e-2)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "auxiliary/routing_cross_entropy" in entry]
    assert entries[-1]["auxiliary/routing_cross_entropy"] < 0.5 * entries[0]["auxiliary/routing_cross_entropy"]
    for name in tiny.EXPERTS:
        assert entries[-1][f"router_accuracy/{name}"] > 0.9
        assert {f"loss/{name}"} <= entries[0].keys()
    assert {"step", "steps", "elapsed_s", "tokens_per_s", "learning_rate", "grad_norm"} <= entries[0].keys()
    assert "routers" in (tmp_path / "screen.txt").read_text()


def test_only_the_adapter_changes_and_the_same_seed_gives_the_same_weights(tmp_path):
    first, second = tiny.moa(), tiny.moa()
    before = {n: p.clone() for n, p in first.named_parameters()}
    _stage(tmp_path, first, 5)
    _stage(tmp_path, second, 5)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p, before[name]) is not ("loramix_" in name), name


def test_learning_rates_of_experts_and_routers(tmp_path):
    model = tiny.moa()
    settings = replace(SETTINGS, learning_rate=1e-4, router_learning_rate=1e-2)
    trainer = MixtureTrainer(
        model, settings=settings, domains=tiny.EXPERTS, args=training_arguments(settings, str(tmp_path))
    )
    groups = trainer.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [1e-4, 1e-2]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
