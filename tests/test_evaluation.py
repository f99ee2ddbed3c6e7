"""Perplexity and router accuracy, against plain definitions."""

from __future__ import annotations

import math

import pytest
import torch

from loramix.data.collation import Collator
from loramix.evaluation.evaluate import measure_routed, score_domains
from loramix.evaluation.scoring import Score, perplexity, score
from tests import tiny
from tests.test_trainer import _examples


def test_perplexity_is_of_totals_not_a_mean_of_means():
    assert perplexity([Score(2.0, 1), Score(1.0, 5)]) == pytest.approx(math.exp(3 / 6))


def test_scores_do_not_depend_on_the_batch():
    model = tiny.moa()
    examples = _examples(9)
    experts = [e.domain_id for e in examples]
    alone = score(model, examples, pad_token_id=tiny.PAD, experts=experts, batch_size=1)
    together = score(model, examples, pad_token_id=tiny.PAD, experts=experts, batch_size=4)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        assert one.nll == pytest.approx(other.nll, rel=1e-4)


def test_score_is_the_models_own_loss():
    base = tiny.llama()
    example = _examples(1)[0]
    batch = Collator(tiny.PAD)([example])
    loss = base(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    got = score(base, [example], pad_token_id=tiny.PAD)[0]
    assert got.nll / got.tokens == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("reads", ["base", "experts"])
def test_routed_measures_agree_with_route_and_with_scoring_each(reads):
    model = tiny.moa(router={"reads": reads})
    examples = _examples(12)
    held = {name: [e for e in examples if e.domain_id == i] for i, name in enumerate(tiny.EXPERTS)}
    result = measure_routed(model, held, pad_token_id=tiny.PAD)
    everything = [e for part in held.values() for e in part]
    for decision in ("last", "vote"):
        chosen = []
        for e in everything:
            prompt = torch.tensor([e.encoded.input_ids[: e.encoded.prompt_length]])
            chosen.append(tiny.EXPERTS.index(model.route(input_ids=prompt, decision=decision)[0].expert))
        right = sum(c == e.domain_id for c, e in zip(chosen, everything, strict=True))
        assert result.routers.overall[decision] == pytest.approx(right / len(everything))
        confusion = torch.tensor(result.routers.confusion[decision])
        assert confusion.trace().item() == right
        assert confusion.sum().item() == len(everything)
        by_hand = iter(score(model, everything, pad_token_id=tiny.PAD, experts=chosen))
        for name, examples_of in held.items():
            wanted = perplexity([next(by_hand) for _ in examples_of])
            assert perplexity(result.by_decision[decision][name]) == pytest.approx(wanted, rel=1e-4)
    labels = iter(score(model, everything, pad_token_id=tiny.PAD, experts=[e.domain_id for e in everything]))
    assert perplexity(result.by_decision["oracle"]["red"]) == pytest.approx(
        perplexity([next(labels) for _ in held["red"]]), rel=1e-4
    )


def test_one_expert_models_score_too():
    held = {"d": _examples(3)}
    assert len(score_domains(tiny.llama(), held, pad_token_id=tiny.PAD)["d"]) == 3
