"""Measures one cell: statistics of every metric, example by example, so that tables and intervals need no model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from loramix.building import with_lora
from loramix.comparison.plan import Cell
from loramix.comparison.settings import MeasureSettings
from loramix.data.collation import Example
from loramix.errors import ModelError
from loramix.evaluation.choice import choice_generated, choice_measured, letter_ids
from loramix.evaluation.evaluate import by_domain, measure_routed
from loramix.evaluation.expert_use import ExpertUse
from loramix.evaluation.extraction import number_measured
from loramix.evaluation.generation import answer
from loramix.evaluation.metrics import Measured, perplexity_measured
from loramix.evaluation.scoring import Score, score
from loramix.evaluation.similarity import similarity
from loramix.evaluation.text_overlap import language_of, text_metric
from loramix.methods import method_named
from loramix.opening import ADAPTER
from loramix.preparation import Prepared
from loramix.routers import SettledBy
from loramix.tuner.assembly import put_experts, take_expert

Held = Mapping[str, Sequence[Example]]
ByDomain = dict[str, list[Score]]
OWN = ""
"""The routing a model has by itself; "oracle" is the label's expert, "extracted" each expert as a plain LoRA."""


def measure_cell(prepared: Prepared, model: Any, cell: Cell, settings: MeasureSettings) -> dict[str, Any]:
    """Returns what is kept of a cell: plain values, one vector of statistics for each example and metric.

    Args:
        prepared: data and base.
        model: the cell's model, ready to answer.
        cell: what it was trained on, and whether unseen domains are measured.
        settings: which metrics.
    """
    return _Measuring(prepared, model, cell, settings).everything()


def extracts(cell: Cell) -> bool:
    """Whether a cell's experts are also measured alone, each as a plain LoRA on its domain (MoA, Table 8): those of a
    method that trains one per domain and mixes them. For one that settles sequences that is the oracle already."""
    method = method_named(cell.experiment.method)
    mixes = method.router is not None and method.settled_by != "prompt" and "experts" in method.trains
    return cell.kind == "method" and mixes and method.expert_count == "one per domain"


def measure_extracted(prepared: Prepared, model: Any, cell: Cell, settings: MeasureSettings) -> dict[str, Any]:
    """Returns domain -> metrics of each expert alone. The model is taken apart: `prepared.base` is the base again."""
    experts = {
        domain: take_expert(model.get_base_model(), ADAPTER, position) for position, domain in enumerate(cell.domains)
    }
    prepared.base = model.unload()
    measured: dict[str, Any] = {}
    for domain, expert in experts.items():
        alone = with_lora(prepared, domain)
        put_experts(alone.get_base_model(), ADAPTER, {domain: expert})
        measuring = _Measuring(prepared, alone, replace(cell, kind="expert", domains=(domain,), unseen=False), settings)
        measured[domain] = measuring.everything()["routings"][OWN][domain]
        prepared.base = alone.unload()
    return measured


@dataclass(frozen=True)
class _Measuring:
    prepared: Prepared
    model: Any
    cell: Cell
    settings: MeasureSettings

    @property
    def settled_by(self) -> SettledBy:
        routed = self.cell.kind == "method"
        return method_named(self.cell.experiment.method).settled_by if routed else "nothing"

    @property
    def held(self) -> Held:
        return {domain: self.prepared.held[domain] for domain in self.cell.domains}

    @property
    def unseen(self) -> Held:
        """Domains nobody trains on; a model that must be told the domain cannot be asked."""
        asked = self.cell.unseen and self.settled_by != "domain"
        return self.prepared.data.unseen if asked else {}

    def everything(self) -> dict[str, Any]:
        started = time.monotonic()
        routings, content = self._scored()
        everything = {**self.held, **self.unseen}
        content["routings"] = {
            routing: {domain: self._of_scores(everything[domain], parts) for domain, parts in scores.items()}
            for routing, scores in routings.items()
        }
        content["answers"] = self._answers(everything, content["routings"][OWN])
        alike = similarity(self.model)
        content["similarity"] = None if alike is None else asdict(alike)
        content["seconds"] = round(time.monotonic() - started, 2)
        return content

    def _scored(self) -> tuple[dict[str, ByDomain], dict[str, Any]]:
        """Returns the scores under each routing, and what the routers did."""
        examples = [example for part in self.held.values() for example in part]
        use = ExpertUse(examples, list(self.prepared.domains))
        letters = self._letters([*examples, *(e for part in self.unseen.values() for e in part)])
        how: dict[str, Any] = {
            "pad_token_id": self.prepared.pad,
            "batch_size": self.settings.batch_size,
            "letters": letters,
        }
        if self.settled_by == "prompt":
            return self._routed(use, how)
        routed = self.cell.kind == "method" and method_named(self.cell.experiment.method).router is not None
        told = [example.domain_id for example in examples] if self.settled_by == "domain" else None
        scores = score(self.model, examples, experts=told, seen=use if routed else None, **how)
        own = by_domain(scores, self.held) | self._unseen_scores(how)
        return {OWN: own}, {"expert_use": asdict(use.result()) if routed else None, "routers": None}

    def _letters(self, examples: Sequence[Example]) -> list[int]:
        """Returns the letters' token ids; none where the tokenizer cannot tell them and answers are written anyway."""
        try:
            return letter_ids(self.prepared.tokenizer, examples)
        except ModelError:
            if self.settings.choice_by_generation:
                return []
            raise

    def _routed(self, use: ExpertUse, how: dict[str, Any]) -> tuple[dict[str, ByDomain], dict[str, Any]]:
        result = measure_routed(self.model, self.held, seen=use, **how)
        decision = self.model.peft_config[ADAPTER].decision
        own = result.by_decision.get("oracle" if decision == "pinned" else decision)
        if own is None:
            examples = [example for part in self.held.values() for example in part]
            own = by_domain(score(self.model, examples, decision=decision, **how), self.held)
        routings = {OWN: own | self._unseen_scores(how, decision), "oracle": result.by_decision["oracle"]}
        perplexities = {
            name: {domain: [[s.nll, s.tokens] for s in parts] for domain, parts in found.items()}
            for name, found in result.by_decision.items()
        }
        return routings, {
            "expert_use": asdict(use.result()),
            "routers": {**asdict(result.routers), "decision": decision, "perplexity": perplexities},
        }

    def _unseen_scores(self, how: dict[str, Any], decision: str | None = None) -> ByDomain:
        examples = [example for part in self.unseen.values() for example in part]
        if not examples or decision == "pinned":
            return {}
        return by_domain(score(self.model, examples, decision=decision, **how), self.unseen)

    def _of_scores(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Any]:
        measured = [perplexity_measured(scores, self.cell.name.partition("/")[0]), choice_measured(examples, scores)]
        return _by_metric(measured)

    def _answers(self, everything: Held, into: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
        """Answers some examples of each domain, adds the metrics of the answers and returns the texts."""
        texts: dict[str, list[dict[str, str]]] = {}
        for domain, part in everything.items():
            wanted = [e for e in part if e.record is not None][: self.settings.answers]
            by_letters = any(e.record.choices for e in wanted if e.record) and not self.settings.choice_by_generation
            if not wanted or by_letters or domain not in into:
                continue
            said = answer(
                self.model,
                self.prepared.tokenizer,
                wanted,
                settled_by=self.settled_by,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
            )
            into[domain] |= _by_metric(self._of_answers(domain, wanted, said))
            texts[domain] = [
                {"prompt": e.record.prompt, "reference": e.record.response, "answer": one}
                for e, one in zip(wanted, said, strict=True)
                if e.record is not None
            ]
        return texts

    def _of_answers(self, domain: str, examples: Sequence[Example], said: Sequence[str]) -> list[Measured | None]:
        if any(e.record is not None and e.record.choices for e in examples):
            return [choice_generated(examples, said)]
        references = [e.record.response for e in examples if e.record is not None]
        if domain in self.settings.exact_number:
            return [number_measured(said, references)]
        language = self.settings.languages.get(domain) or language_of(references)
        return [text_metric(metric, said, references, language) for metric in self.settings.text]


def _by_metric(measured: Sequence[Measured | None]) -> dict[str, Any]:
    return {one.metric: {"signature": one.signature, "stats": one.stats} for one in measured if one is not None}
