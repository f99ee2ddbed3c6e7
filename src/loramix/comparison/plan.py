"""Which cells a comparison has: each a model trained once, named for all that went into it.

A cell's folder carries a hash of everything its training depends on (base, seed, adapter, settings, the tokens it
learns, the cells it starts from). So a finished cell is found again whatever else changed in the comparison, two rows
that need the same expert share it, and a changed setting never meets an old result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loramix.adapter_settings import adapter_config
from loramix.budget import longer_settings, rows_per_step, steps
from loramix.comparison.lengths import Lengths, lengths_of
from loramix.comparison.rows import LONGER, Row
from loramix.comparison.settings import Comparison
from loramix.corpus import Encoded
from loramix.data.collation import Example
from loramix.methods import method_named
from loramix.settings import Experiment

_ROUTERS_ONLY = ("losses", "router_learning_rate")
Kind = Literal["base", "expert", "longer", "method"]


@dataclass(frozen=True)
class Cell:
    """One model to train and measure.

    Attributes:
        name: its folder below OUT/cells.
        kind: the bare base; one domain's LoRA; the same trained on; or a method.
        experiment: base, method, seed, adapter and the settings of its last stage, lengths settled.
        domains: what it is trained on.
        unseen: whether domains nobody trains on are measured too.
        needs: domain -> the cell whose expert it starts from.
        work: examples it learns and measures, for the time left.
        held: domain -> hash of the examples it is measured on.
    """

    name: str
    kind: Kind
    experiment: Experiment
    domains: tuple[str, ...]
    unseen: bool
    needs: Mapping[str, str]
    work: int
    held: Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """Where a row of the table finds a cell: the row's label and setting, base, seed and, in the single setting, the
    domain."""

    label: str
    setting: str
    base: str
    seed: int
    domain: str | None
    cell: str


@dataclass
class Plan:
    """All cells by name, those that others need first, and the entries of the table."""

    cells: dict[str, Cell] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)


def short_name(base: str) -> str:
    """Returns the last part of a base's name or path, fit for a folder."""
    return re.sub(r"[^\w.+-]+", "-", base.rstrip("/").rpartition("/")[2]) or "base"


def digest(content: Any) -> str:
    """Returns the sha256 of a plain value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


def digest_of_examples(examples: Sequence[Example]) -> str:
    """Returns the sha256 of what is learned, or measured, of some examples."""
    rows = [[e.encoded.input_ids, e.encoded.supervised, e.encoded.prompt_length, e.domain_id] for e in examples]
    return digest(rows)


def plan(comparison: Comparison, encoded: Callable[[Experiment], Encoded]) -> Plan:
    """Returns the cells of a comparison, in an order in which they can be run one after the other.

    Args:
        comparison: what is asked for.
        encoded: gives the encoded data of an experiment (its base and its data section).
    """
    made = Plan()
    for base in comparison.bases:
        for seed in comparison.shared.seeds:
            for row in comparison.rows:
                first = comparison.shared.seeds[0]
                data_seed = row.experiment.data.seed
                data = row.experiment.data.model_copy(update={"seed": first if data_seed is None else data_seed})
                experiment = row.experiment.model_copy(
                    update={"model_name_or_path": base, "seed": seed, "data": data, "controls": []}
                )
                data_of_row = encoded(experiment)
                lengths = lengths_of(comparison.rows, experiment, data_of_row)
                _RowPlan(made, row, experiment, data_of_row, lengths).add()
    return made


class _RowPlan:
    """Adds the cells of one row, for one base and seed."""

    def __init__(self, made: Plan, row: Row, experiment: Experiment, data: Encoded, lengths: Lengths) -> None:
        self.made, self.row, self.experiment, self.data, self.lengths = made, row, experiment, data, lengths

    def add(self) -> None:
        everything = tuple(self.data.train)
        for setting in self.row.settings:
            if setting == "none":
                self._enter(setting, None, self._cell("base", everything, None, {}))
            elif setting == "single":
                for domain in everything:
                    self._enter(setting, domain, self._alone(domain))
            elif method_named(self.row.method).starts_from_experts:
                needs = {domain: self._expert(domain).name for domain in everything}
                self._enter(setting, None, self._cell("method", everything, self.experiment, needs))
            else:
                experiment = self._lasting(self.experiment, None)
                self._enter(setting, None, self._cell("method", everything, experiment, {}))

    def _alone(self, domain: str) -> Cell:
        if self.row.method == "lora":
            return self._expert(domain)
        if self.row.method == LONGER:
            share = self.data.shares(self.experiment.data)[domain]
            settings = longer_settings(self.lengths.second, self.lengths.joint_steps, share)
            changed = {"training": asdict(settings) | {"losses": dict(settings.losses)}}
            experiment = self.experiment.model_copy(update=changed)
            return self._cell("longer", (domain,), experiment, {domain: self._expert(domain).name})
        return self._cell("method", (domain,), self._lasting(self.experiment, domain), {})

    def _expert(self, domain: str) -> Cell:
        """Stage 1 of one domain: the same cell for every row that has the same adapter and settings."""
        adapter = adapter_config(self.experiment, list(self.data.train), "lora", domain).to_dict()
        kept = {name: adapter[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "exclude_modules")}
        kept["layers_to_transform"] = adapter.get("layers_to_transform")
        targets = adapter["target_modules"]
        kept["target_modules"] = targets if isinstance(targets, str) or targets is None else sorted(targets)
        fields = type(self.experiment.adapter).model_fields
        settings = {name: value for name, value in kept.items() if name in fields}
        experiment = self.experiment.model_copy(
            update={
                "method": "lora",
                "adapter": type(self.experiment.adapter)(**settings),
                # What only routers read must not keep two rows from sharing their experts.
                "training": {
                    k: v for k, v in self.row.stages[0].items() if k not in ("losses", "router_learning_rate")
                },
                "expert_stage": {},
                "joint_stage": {},
            }
        )
        cell = self._cell("expert", (domain,), experiment, {})
        self.made.cells.setdefault(cell.name, cell)
        return cell

    def _lasting(self, experiment: Experiment, domain: str | None) -> Experiment:
        """Returns the experiment with its only stage as long as all stages of the longest two-stage row: on all
        domains, or on one."""
        training = self.lengths.as_long(self.row.stages[0], experiment, domain)
        return experiment.model_copy(update={"training": training, "expert_stage": {}, "joint_stage": {}})

    def _cell(
        self,
        kind: Kind,
        domains: tuple[str, ...],
        experiment: Experiment | None,
        needs: Mapping[str, str],
    ) -> Cell:
        experiment = experiment or self.experiment
        base = experiment.model_name_or_path
        content: dict[str, Any] = {"kind": kind, "base": base, "dtype": experiment.dtype, "needs": dict(needs)}
        unseen = bool(self.data.unseen) and len(domains) == len(self.data.train)
        held = {domain: digest_of_examples(self.data.held[domain]) for domain in domains}
        if unseen:
            held |= {domain: digest_of_examples(part) for domain, part in self.data.unseen.items()}
        work = sum(len(self.data.held[d]) for d in domains)
        label = self.row.label
        if kind != "base":
            seed = experiment.seed
            content |= {"seed": seed, "method": experiment.method, "adapter": experiment.adapter.model_dump()}
            content |= {
                "stages": [experiment.settings(s).learned() for s in (experiment.expert_stage, experiment.joint_stage)]
            }
            content |= {"search": experiment.search.model_dump(), "kinds": self._kinds(experiment, domains)}
            content["learned"] = {d: digest_of_examples(self.data.train[d]) for d in domains}
            content["shares"] = self.data.shares(experiment.data) if len(domains) > 1 else {}
            work += self._learned(kind, domains, experiment)
            label = domains[0] if kind == "expert" else label if len(domains) > 1 else f"{label}-{domains[0]}"
            label = f"{'expert-' * (kind == 'expert')}{label}-s{seed}"
        slug = re.sub(r"[^\w.+=-]+", "-", label)
        name = f"{short_name(base)}/{slug}-{digest(content)[:10]}"
        known = self.made.cells.get(name)
        if known is not None and known.held != held:  # another row learns the same and is measured on other rows
            name = f"{name}-{digest(held)[:6]}"
        return Cell(name, kind, experiment, domains, unseen, needs, work, held)

    def _kinds(self, experiment: Experiment, domains: tuple[str, ...]) -> dict[str, int] | None:
        """Returns the kinds of data as the losses of a method see them; None for methods that tell none apart."""
        if not {"localized_balance", "localized_balance_cv"} & set(method_named(experiment.method).losses):
            return experiment.data.kinds  # type: ignore[return-value]
        kinds = self.data.kinds(experiment.data)
        return {domain: kinds[domain] for domain in domains}

    def _learned(self, kind: Kind, domains: tuple[str, ...], experiment: Experiment) -> int:
        if kind == "method" and not method_named(experiment.method).stages[-1].takes_steps:
            return 0
        stage = experiment.joint_stage if kind == "method" else {}
        settings = experiment.settings(stage)
        return 3 * rows_per_step(settings) * steps(settings, sum(len(self.data.train[d]) for d in domains))

    def _enter(self, setting: str, domain: str | None, cell: Cell) -> None:
        self.made.cells.setdefault(cell.name, cell)
        experiment = self.experiment
        seed = experiment.seed
        entry = Entry(self.row.label, setting, experiment.model_name_or_path, seed, domain, cell.name)
        self.made.entries.append(entry)
