"""What is measured of an experiment, and what of it is written to results.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from loramix.data.collation import Example
from loramix.evaluation.evaluate import RoutedResult, Row, measure_routed, rows_of, score_domains
from loramix.evaluation.generation import answer
from loramix.methods import method_named
from loramix.opening import ADAPTER
from loramix.preparation import Prepared


@dataclass
class Results:
    """What is written to results.json."""

    rows: list[Row] = field(default_factory=list)
    routed: RoutedResult | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self, domains: Sequence[str], method: str) -> dict[str, Any]:
        """Returns the content of results.json; see docs/results-format.md."""
        content: dict[str, Any] = {
            "method": method,
            "domains": list(domains),
            "rows": [asdict(row) for row in self.rows],
        }
        if self.routed is not None:
            routers = self.routed.routers
            content["router_accuracy"] = routers.by_domain
            content["router_accuracy_overall"] = routers.overall
            content["router_accuracy_by_layer"] = routers.by_layer
            content["router_confusion"] = routers.confusion
            content["router_prompts"] = routers.prompts
            content["router_calibration"] = asdict(routers.calibration)
            content["perplexity_by_decision"] = {
                decision: {row.domain: row.perplexity for row in rows_of(decision, scores)}
                for decision, scores in self.routed.by_decision.items()
            }
        content["examples"] = self.examples
        content["stages"] = self.stages
        content["seconds"] = round(self.seconds, 1)
        return content


def measure(prepared: Prepared, model: Any, results: Results) -> None:
    """Measures the experiment's model: a row for each domain, or under the oracle and its own decision if it settles
    experts by prompt."""
    method = method_named(prepared.experiment.method)
    name = "mixed" if method.expert_count == "one" else method.name
    if method.settled_by != "prompt":
        told = method.settled_by == "domain"
        experts = [e.domain_id for examples in prepared.held.values() for e in examples] if told else None
        scores = score_domains(model, prepared.held, pad_token_id=prepared.pad, experts=experts)
        results.rows += rows_of(name, scores)
        return
    routed = measure_routed(model, prepared.held, pad_token_id=prepared.pad)
    decision = model.peft_config[ADAPTER].decision
    if decision not in routed.by_decision and decision != "pinned":
        scores = score_domains(model, prepared.held, pad_token_id=prepared.pad, decision=decision)
        routed.by_decision[decision] = scores
    named = [("oracle", "oracle")] + ([("routed", decision)] if decision != "pinned" else [])
    for label, which in named:
        results.rows += rows_of(f"{name}_{label}", routed.by_decision[which])
    results.routed = routed


def answers(prepared: Prepared, model: Any, most_tokens: int = 40) -> list[dict[str, Any]]:
    """Returns one answer for each domain: to the first held-out prompt that leaves room for one."""
    room = getattr(prepared.base.config, "max_position_embeddings", None) or 1 << 30
    how = method_named(prepared.experiment.method).settled_by
    chosen: dict[str, Example] = {}
    for domain, examples in prepared.held.items():
        fitting = (e for e in examples if e.encoded.prompt_length + most_tokens <= room and e.record is not None)
        if (example := next(fitting, None)) is not None:
            chosen[domain] = example
    asked = list(chosen.values())
    written = answer(model, prepared.tokenizer, asked, settled_by=how, max_new_tokens=most_tokens)
    return [
        {
            "domain": domain,
            "prompt": example.record.prompt,
            **(_expert_said(model, example, domain) if how == "prompt" else {}),
            "answer": text,
            "reference": example.record.response,
        }
        for (domain, example), text in zip(chosen.items(), written, strict=True)
        if example.record is not None
    ]


def _expert_said(model: Any, example: Example, domain: str) -> dict[str, Any]:
    """Returns which expert answers a prompt, and how sure its decision was."""
    prompt = torch.tensor([example.encoded.input_ids[: example.encoded.prompt_length]], device=model.device)
    pinned = model.peft_config[ADAPTER].decision == "pinned"
    route = model.route(input_ids=prompt, expert=domain if pinned else None)[0]
    return {"expert": route.expert, "probability": None if route.probability is None else round(route.probability, 4)}
