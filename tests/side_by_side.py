"""A method and its slow twin side by side: everything that is compared of the two."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from loramix.losses import AUXILIARY, Seen
from tests import method_cases as cases
from tests import reference_losses
from tests.method_cases import CASES

FACTOR = 0.7
"""Of every auxiliary loss, so that none is too small to be seen in the gradients."""
SLOW_LOSSES = {
    "load_balance": lambda book, given: reference_losses.load_balance(book, given.mask),
    "router_z": lambda book, given: reference_losses.router_z(book, given.mask),
    "gate_balance": lambda book, given: reference_losses.gate_balance(book, given.mask),
    "contrastive": lambda book, given: reference_losses.contrastive(book, given.mask),
    "localized_balance": lambda book, given: reference_losses.localized_balance(book, given.mask, given.kinds),
    "localized_balance_cv": lambda book, given: reference_losses.localized_balance(
        book, given.mask, given.kinds, squared=True
    ),
}


def language_loss(logits: Tensor, given: cases.Batch) -> Tensor:
    """The negative log-likelihood of each real token after the first."""
    losses = []
    for b, t in given.mask[:, 1:].nonzero().tolist():
        scores = logits[b, t].double()
        losses.append(torch.log(torch.exp(scores).sum()) - scores[given.ids[b, t + 1]])
    return torch.stack(losses).sum()


def run(model: torch.nn.Module, given: cases.Batch, **told: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the embeddings, which take a gradient, and the logits at real places."""
    embeddings = model.get_input_embeddings()(given.ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=given.mask, use_cache=False, **told).logits
    return embeddings, logits


def ours(name: str, dtype: torch.dtype = torch.float64, **settings: object) -> dict[str, Tensor]:
    """Everything that can be compared, of the model under test."""
    given = cases.batch()
    return outcome_of(cases.build(name, dtype=dtype, **settings).train(), given, CASES[name].losses)


def outcome_of(model: torch.nn.Module, given: cases.Batch, losses: tuple[str, ...]) -> dict[str, Tensor]:
    domains, kinds = torch.tensor(given.domains), torch.tensor(given.kinds)
    with cases.all_in_double() if model.dtype == torch.float64 else nullcontext():
        embeddings, logits = run(model, given, domain_ids=domains)
        seen = Seen(model.routings, model.expert_outputs, domains, kinds)
        values = {name: AUXILIARY[name].value(seen) for name in losses}
        (language_loss(logits, given) + FACTOR * sum(values.values())).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {
        "logits": logits[given.mask.bool()],
        "embeddings": embeddings.grad[given.mask.bool()],
        **values,
        **gradients,
    }


@cache
def wanted(name: str) -> dict[str, Tensor]:
    """The same, of the slow twin."""
    given = cases.batch()
    return outcome_of_twin(name, cases.twin(name, cases.build(name), given), given)


def outcome_of_twin(name: str, twin: cases.Twin, given: cases.Batch) -> dict[str, Tensor]:
    with cases.all_in_double():
        embeddings, logits = run(twin.model, given)
        values = {loss: SLOW_LOSSES[loss](twin.book, given) for loss in CASES[name].losses}
        (language_loss(logits, given) + FACTOR * sum(values.values())).backward()
    trained = tuple(f".loramix_{part}." for part in CASES[name].trains)
    gradients = {n: gradient(p) for n, p in twin.parameters.items() if any(part in n for part in trained)}
    return {
        "logits": logits[given.mask.bool()],
        "embeddings": embeddings.grad[given.mask.bool()],
        **values,
        **gradients,
    }


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float, atol: float) -> None:
    assert set(got) == set(wanted)
    for name, value in got.items():
        assert value is not None, f"{name}: no gradient"
        torch.testing.assert_close(
            value.double(), wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def change(monkeypatch: pytest.MonkeyPatch, name: str, **changes: object) -> None:
    """Changes what a method's case says of it, for one test."""
    monkeypatch.setitem(CASES, name, replace(CASES[name], **changes))


def compare(name: str, **settings: object) -> None:
    """Compares a method with other settings; its case has been changed to say the same."""
    given = cases.batch()
    model = cases.build(name, dtype=torch.float64, **settings)
    expected = outcome_of_twin(name, cases.twin(name, model, given), given)
    assert_same(ours(name, **settings), expected, rtol=1e-9, atol=1e-10)
