"""An experiment's data and base, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loramix.adapter_settings import adapter_config
from loramix.corpus import Encoded, encode_all, every_name, rooted
from loramix.data.collation import Example
from loramix.environment import environment
from loramix.experiment import as_yaml
from loramix.journal import Journal
from loramix.methods import method_named
from loramix.models import load_base, load_skeleton, load_tokenizer
from loramix.processes import writes
from loramix.run_folder import RunFolder, write_json, write_text_safely
from loramix.settings import Experiment
from loramix.training.keeper import Keeping
from loramix.tuner import check_fit

OVERLAP = "overlap between parts"
"""Key of data.json; longer than any use for a domain's name makes likely."""


@dataclass
class Prepared:
    """Data and base of an experiment, checked and encoded.

    Attributes:
        experiment, run: settings and folder.
        base, tokenizer: the frozen model.
        data: all examples.
        console: where progress is shown.
        keeping: keeps checkpoints, if any are to be kept.
        journal: of what is done, for runs that can go on.
    """

    experiment: Experiment
    run: RunFolder
    base: Any
    tokenizer: Any
    data: Encoded
    console: Console
    keeping: Keeping | None = None
    journal: Journal | None = None

    @property
    def train(self) -> dict[str, list[Example]]:
        return self.data.train

    @property
    def held(self) -> dict[str, list[Example]]:
        return self.data.held

    @property
    def domains(self) -> list[str]:
        return list(self.data.train)

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def shares(self) -> dict[str, float]:
        """Returns each domain's share of the mixture."""
        return self.data.shares(self.experiment.data)

    def kinds(self) -> list[int]:
        """Returns the kind of each domain, in the order of `domain_ids`."""
        return list(self.data.kinds(self.experiment.data).values())


def prepare(experiment: Experiment, console: Console, *, new: bool = True) -> Prepared:
    """Returns the experiment's data and base. Nothing is written before all of it is found good.

    Args:
        experiment: the settings.
        console: where progress is shown.
        new: make the run folder and write its settings; False reads data for a run that exists.

    Raises:
        DataError, ModelError, ConfigError: what is wrong, all at once for the data.
    """
    tokenizer = load_tokenizer(experiment.model_name_or_path)
    data = encode_all(experiment, tokenizer)
    if method_named(experiment.method).tuner == "loramix":
        check_fit(load_skeleton(experiment.model_name_or_path), adapter_config(experiment, list(data.train)))
    base = load_base(experiment.model_name_or_path, **experiment.base_form())
    run = RunFolder(Path(experiment.output_dir))
    prepared = Prepared(experiment, run, base, tokenizer, data, console)
    if new and writes():
        run.create()
        record(prepared)
    _report_cuts(data.counts, console)
    report_overlap(data.overlap, console)
    return prepared


def record(prepared: Prepared) -> None:
    """Writes into the run's folder what it is made of: settings, machine and versions, data."""
    run, data = prepared.run, prepared.data
    write_text_safely(run.config, as_yaml(anchored(prepared.experiment)))
    write_json(run.environment, environment())
    write_json(run.data, {**data.counts, OVERLAP: data.overlap} if data.overlap else data.counts)


def without_data(experiment: Experiment, run: RunFolder, names: Sequence[str], console: Console) -> Prepared:
    """Returns a base for work on a mixture that needs no examples.

    Args:
        experiment: the settings.
        run: its folder.
        names: of the domains, in the order of the experts.
        console: where progress is shown.
    """
    nothing: dict[str, list[Example]] = {name: [] for name in names}
    data = Encoded(nothing, dict(nothing), {}, {}, [])
    base = load_base(experiment.model_name_or_path, **experiment.base_form())
    return Prepared(experiment, run, base, load_tokenizer(experiment.model_name_or_path), data, console)


def anchored(experiment: Experiment) -> Experiment:
    """Returns the experiment with local paths made absolute, so that the run can be opened from anywhere."""

    data = experiment.data
    found = {
        name: every_name(rooted(getattr(data, name), data.root), _absolute) for name in ("domains", "unseen", "path")
    }
    return experiment.model_copy(
        update={
            "model_name_or_path": _absolute(experiment.model_name_or_path),
            "data": data.model_copy(update={**found, "root": None}),
        }
    )


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if name and ("*" in name or path.exists()) else name


def report_overlap(overlap: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Says which test rows occur in training data.

    Args:
        overlap: of the encoded data.
        console: where it is shown.
    """
    for one in overlap:
        if one["sides"] == "train-test":
            console.print(
                f"leak: {one['count']} of {one['of']} test rows of {one['test']} occur in the training data of "
                f"{one['train']} ({one['kind']}), for example {one['examples'][0][0]} and {one['examples'][0][1]}; "
                "data.overlap=drop leaves them out of training",
                highlight=False,
                soft_wrap=True,
            )


def _report_cuts(counts: dict[str, Any], console: Console) -> None:
    for domain, splits in counts.items():
        if "train" not in splits:
            console.print(f"{domain}: {splits['test']['examples']} to test on, none to train on", highlight=False)
            continue
        train = splits["train"]
        line = f"{domain}: {train['examples']} to train on, {splits['test']['examples']} to test on"
        cuts = [
            f"{splits[s][kind]} {kind} ({s})"
            for s in ("train", "test")
            for kind in ("shortened", "dropped")
            if splits[s][kind]
        ]
        if cuts:
            line += f"; longer than the limit: {', '.join(cuts)}"
        console.print(line, highlight=False, soft_wrap=True)
