"""loramix inside other people's training: Trainer, TRL, a plain loop by accelerate; the same gradients as our own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import loramix
from loramix.losses import load_balance, routing_cross_entropy
from tests import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_base(tmp_path_factory.mktemp("guests") / "base"))


def example(name: str, base: str, out: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](base, str(out), **how)


def check_taught(base: str, out: Path) -> None:
    """The saved adapter loads, and its routers tell the toy domains apart, which untaught ones do not."""
    toy = runpy.run_path(str(EXAMPLES / "toy_data.py"))
    some = toy["rows"](30)[-18:]
    tokenizer = loramix.load_tokenizer(base)
    model = PeftModel.from_pretrained(loramix.load_base(base), str(out / "adapter"))
    routes = model.route([row["prompt"] for row in some], tokenizer)
    right = sum(route.expert == row["domain"] for route, row in zip(routes, some, strict=True))
    assert right >= 15, f"{right} of 18"


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_hf_trainer_teaches_experts_and_routers(base: str, tmp_path: Path, monkeypatch):
    losses = logged(example("hf_trainer", base, tmp_path, monkeypatch, steps=120))
    assert losses[-1] < losses[0] - 0.2  # the base is random, so there is little to gain
    check_taught(base, tmp_path)


def test_trl_teaches_experts_and_routers(base: str, tmp_path: Path, monkeypatch):
    pytest.importorskip("trl")
    losses = logged(example("trl_sft", base, tmp_path, monkeypatch, steps=120))
    assert losses[-1] < losses[0] - 0.2  # the base is random, so there is little to gain
    check_taught(base, tmp_path)


def test_a_plain_loop_by_accelerate_teaches_experts_and_routers(base: str, tmp_path: Path, monkeypatch):
    losses = example("plain_loop", base, tmp_path, monkeypatch)
    assert losses[-1] < losses[0] - 0.2  # the base is random, so there is little to gain
    check_taught(base, tmp_path)


IDS = tiny.ids(4, 9)
DOMAIN_IDS = torch.tensor([0, 2, 1, 1])


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def explicit(model: PeftModel) -> dict[str, torch.Tensor]:
    """Loss and routing loss added by hand."""
    loss = model(input_ids=IDS, labels=tiny.labels(IDS), domain_ids=DOMAIN_IDS).loss
    (loss + 0.1 * routing_cross_entropy(model.routings, DOMAIN_IDS).mean()).backward()
    return gradients(model)


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert any("router" in name and grad.abs().max() > 0 for name, grad in wanted.items())
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_attached_losses_give_the_gradients_of_losses_added_by_hand():
    model = tiny.moa().train()
    wanted = explicit(model)
    attached = loramix.attach_losses(model)
    out = model(input_ids=IDS, labels=tiny.labels(IDS), domain_ids=DOMAIN_IDS)
    assert set(attached.values) == {"routing_cross_entropy"}
    out.loss.backward()
    assert_same(gradients(model), wanted)
    loramix.detach_losses(model)
    model(input_ids=IDS, labels=tiny.labels(IDS), domain_ids=DOMAIN_IDS).loss.backward()
    assert not any("router" in name for name in gradients(model))


def test_a_loss_made_of_logits_carries_them_too():
    model = tiny.moa().train()
    wanted = explicit(model)
    loramix.attach_losses(model)
    prompt_mask = torch.arange(IDS.shape[1]).expand_as(IDS) < 3
    out = model(input_ids=IDS, domain_ids=DOMAIN_IDS, prompt_mask=prompt_mask)
    labels = tiny.labels(IDS)[:, 1:].flatten()
    torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels).backward()
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole(checkpointed: bool):
    model = tiny.moa().train()
    wanted = explicit(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    loramix.attach_losses(model, accumulation=4)
    for row in range(4):
        part = IDS[row : row + 1]
        loss = model(input_ids=part, labels=tiny.labels(part), domain_ids=DOMAIN_IDS[row : row + 1]).loss
        (loss / 4).backward()  # as many supervised tokens in each row
    got = {n: g for n, g in gradients(model).items() if n in wanted}
    assert_same(got, wanted)


def test_losses_of_token_routers_are_carried():
    torch.manual_seed(0)
    config = loramix.LoramixConfig(method="mola", num_experts=4, r=4, lora_dropout=0.0, init_lora_weights=False)
    model = get_peft_model(tiny.llama(), config).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    (loss + 1e-3 * load_balance(model.routings.values())).backward()
    wanted = gradients(model)
    loramix.attach_losses(model, {"load_balance": 1e-3})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert_same(gradients(model), wanted)


class Rows(torch.utils.data.Dataset):
    """Eight rows that name their domain."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, at: int) -> dict[str, Any]:
        ids = tiny.ids(8, 9)[at]
        return {"input_ids": ids.tolist(), "labels": tiny.labels(ids[None])[0].tolist(), "domain": at % 3}


def stacked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (1, 4), (2, 2)])
def test_trainer_takes_the_step_that_a_plain_loop_takes(rows: int, accumulation: int, tmp_path: Path):
    """One optimizer step of plain SGD on the same four rows, whatever way they are cut up."""
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    model = tiny.moa()
    loramix.attach_losses(model, accumulation=accumulation)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    collator = loramix.DomainCollator(stacked, tiny.EXPERTS)
    Trainer(model, arguments, train_dataset=Rows(), data_collator=collator).train()
    other = tiny.moa().train()
    batch = collator([Rows()[n] for n in range(4)])
    loss = other(**batch).loss
    (loss + 0.1 * routing_cross_entropy(other.routings, batch["domain_ids"]).mean()).backward()
    for name, parameter in other.named_parameters():
        if parameter.grad is not None:
            moved = start[name] - dict(model.named_parameters())[name].detach()
            torch.testing.assert_close(moved, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_what_cannot_be_taught_is_said():
    model = tiny.moa().train()
    with pytest.raises(loramix.ConfigError, match="has nothing to apply it to"):
        loramix.attach_losses(model, {"contrastive": 0.1})
    with pytest.raises(loramix.ConfigError, match="expected the micro-batches"):
        loramix.attach_losses(model, accumulation=0)
    with pytest.raises(loramix.ConfigError, match="nothing to teach"):
        loramix.attach_losses(tiny.llama())
    single = get_peft_model(tiny.llama(), loramix.LoramixConfig(method="lora"))
    with pytest.raises(loramix.ConfigError, match="nothing to teach"):
        loramix.attach_losses(single)


def test_our_own_trainer_does_not_add_them_twice(tmp_path: Path):
    from loramix.training.arguments import training_arguments
    from loramix.training.settings import TrainingSettings
    from loramix.training.trainer import MixtureTrainer

    model = tiny.moa()
    loramix.attach_losses(model)
    settings = TrainingSettings()
    with pytest.raises(loramix.ConfigError, match="Call detach_losses first"):
        MixtureTrainer(model, settings=settings, domains=tiny.EXPERTS, args=training_arguments(settings, str(tmp_path)))


def test_the_collator_names_wrong_domains_and_refuses_packing():
    collator = loramix.DomainCollator(stacked, tiny.EXPERTS)
    batch = collator([{"input_ids": [1, 2], "domain": "blue"}, {"input_ids": [3, 4], "domain": 0}])
    assert batch["domain_ids"].tolist() == [2, 0]
    assert "domain" not in batch
    with pytest.raises(loramix.DataError, match=r"2 problems(?s:.*)Did you mean .green."):
        collator([{"input_ids": [1], "domain": "greeen"}, {"input_ids": [1]}])
    packed = loramix.DomainCollator(lambda rows: {"input_ids": torch.zeros(1, 4)}, tiny.EXPERTS)
    with pytest.raises(loramix.ConfigError, match="Turn packing off"):
        packed([{"domain": 0}, {"domain": 1}])


@pytest.mark.parametrize("borders", [False, True])
def test_rows_one_after_the_other_are_routed_row_by_row(borders: bool):
    """transformers' own flattening, under somebody else's loop."""
    rows = [{"input_ids": [5, 6, 7, 8], "domain": 2}, {"input_ids": [9, 10, 11], "domain": 0}]
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=borders, return_tensors="pt")
    labelled = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]
    batch = loramix.DomainCollator(flatten, tiny.EXPERTS)(labelled)
    assert batch["domain_ids"].tolist() == [2, 0]
    model = tiny.moa(lora_dropout=0.0).train()
    together = model(**batch, use_cache=False).logits[0]
    for row, part in zip(rows, (slice(0, 4), slice(4, 7)), strict=True):
        ids = torch.tensor([row["input_ids"]])
        alone = model(input_ids=ids, domain_ids=torch.tensor([row["domain"]]), prompt_mask=torch.ones(1, 2)).logits[0]
        torch.testing.assert_close(together[part], alone, rtol=1e-4, atol=1e-5)
