"""Are discovered domains as good as true ones? MoA trained on both, measured on the same held-out rows.

    python benchmarks/discovered_labels.py rows runs/discover/rows --train 32 --test 24
    loramix experts discover --data runs/discover/rows --output-dir runs/discover/found
    python benchmarks/discovered_labels.py train runs/discover/found --work runs/discover [--json]

`rows` writes a folder of some rows of each demo domain, with their true label in a column; with --recipe and --root it
takes the domains of a comparison recipe instead. `train` trains MoA on the true labels and on the discovered labels of
each folder it is given, with --random also on labels dealt out at random. It prints perplexity on the rows that all of
them hold out: exp(sum of NLL / tokens), overall and by true domain, routed by the last router and, to tell experts from
routers, by the expert of the label each row has there. Runs that are finished are only measured. docs/discover.md holds
the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from loramix.cli.output import print_table, progress_console, quiet_libraries

RECIPE = Path(__file__).parent.parent / "recipes" / "discovered" / "moa.yaml"


def write_rows(folder: Path, sources: dict[str, Any], train: int, test: int) -> None:
    """Writes train.jsonl and test.jsonl with so many rows of each domain and the domain in a column, shuffled."""
    from loramix.data.domains import read_domains
    from loramix.lifecycle.discover_data import Found, as_row
    from loramix.lifecycle.discover_data import write_rows as write

    splits = read_domains(sources, max_train_examples=train, max_test_examples=test)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        found = [Found(record, domain) for domain, one in splits.items() for record in getattr(one, split)]
        rows = [{name: value for name, value in as_row(one).items() if name != "true_domain"} for one in found]
        random.Random(0).shuffle(rows)  # a fixed order, not a secret
        write(folder / f"{split}.jsonl", rows)


def dealt_out(data: Path, folder: Path) -> Path:
    """Returns a copy of a labelled data set whose labels are shuffled over the rows of each part."""
    from loramix.lifecycle.discover_data import write_rows as write

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        rows = [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
        labels = [row["domain"] for row in rows]
        random.Random(0).shuffle(labels)
        write(folder / name, [{**row, "domain": label} for row, label in zip(rows, labels, strict=True)])
    return folder


def trained(folders: list[Path], work: Path, overrides: list[str], *, at_random: bool) -> tuple[Any, dict[str, Any]]:
    """Returns the settings of the runs, and their folders (None: the base)."""
    from loramix.experiment import load
    from loramix.pipeline import run_experiment
    from loramix.run_folder import RunFolder

    first, console = folders[0], progress_console()
    arms = {"true": [f"data.path={first}", "data.domain_column=true_domain"]}
    arms |= {folder.name: [f"data.path={folder}"] for folder in folders}
    if at_random:
        arms["random"] = [f"data.path={dealt_out(first, work / 'rows-random')}"]
    found: dict[str, Any] = {"base": None}
    for arm, own in arms.items():
        run = RunFolder(work / f"run-{arm}")
        # The run's own measuring knows no true domains; a few rows of each will do.
        own += ["controls=[]", "data.max_test_examples=3", f"output_dir={run.path}"]
        experiment = load(RECIPE, [*overrides, *own]).experiment
        if not run.results.is_file():
            console.print(f"MoA on {arm} labels", style="bold")
            run.clear()
            run_experiment(experiment, console)
        found[arm] = run
    return experiment, found


def held_out(folders: list[Path]) -> list[Any]:
    """Returns the records with their true labels that all folders hold out."""
    from loramix.data.reading import read_file
    from loramix.errors import DataError, Problems

    problems = Problems("the folders")
    parts = [read_file(one / "test.jsonl", problems, domain=None, domain_column="true_domain") for one in folders]
    problems.raise_as(DataError)
    shared = set.intersection(*({record.messages for record in part} for part in parts))
    return [record for record in parts[0] if record.messages in shared]


def measure(experiment: Any, runs: dict[str, Any], records: list[Any]) -> dict[str, Any]:
    """Returns summed NLL and tokens by model and true domain."""
    from loramix.corpus import encode_domain
    from loramix.evaluation.scoring import score
    from loramix.models import load_base, load_tokenizer
    from loramix.opening import load_adapter

    tokenizer, data = load_tokenizer(experiment.model_name_or_path), experiment.data
    examples, _ = encode_domain(tokenizer, records, 0, max_length=data.max_length, truncation=data.truncation)
    found: dict[str, Any] = {}
    for name, run in runs.items():
        model = load_base(experiment.model_name_or_path, dtype=experiment.dtype)
        ways: dict[str, dict[str, Any]] = {name: {}}
        if run is not None:
            model = load_adapter(model, run.model)
            ways = {f"{name}, routed": {"decision": "last"}, f"{name}, told": {"experts": told(run, model, examples)}}
        for way, how in ways.items():
            scores = score(model, examples, pad_token_id=int(tokenizer.pad_token_id), **how)
            found[way] = {}
            for example, one in zip(examples, scores, strict=True):
                for key in (example.record.domain, "all rows"):
                    sums = found[way].setdefault(key, {"nll": 0.0, "tokens": 0})
                    sums["nll"] += one.nll
                    sums["tokens"] += one.tokens
    return found


def told(run: Any, model: Any, examples: list[Any]) -> list[int]:
    """Returns the position of the expert of each row's label in the data that a run was trained on."""
    from loramix.data.reading import read_file
    from loramix.errors import DataError, Problems
    from loramix.experiment import load

    data, problems = load(run.config).experiment.data, Problems("the run's data")
    rows = read_file(Path(data.path) / "test.jsonl", problems, domain=None, domain_column=data.domain_column)
    problems.raise_as(DataError)
    labels = {row.messages: row.domain for row in rows}
    experts = model.peft_config["default"].experts
    return [experts.index(labels[example.record.messages]) for example in examples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    rows = verbs.add_parser("rows", help="write some rows of each domain")
    rows.add_argument("folder", type=Path)
    rows.add_argument("--recipe", type=Path, help="take data.domains of this file; by default the demo's")
    rows.add_argument("--root", help="folder that its paths are relative to")
    rows.add_argument("--train", type=int, default=32)
    rows.add_argument("--test", type=int, default=24)
    arms = verbs.add_parser("train", help="train on discovered, true and random labels, and measure")
    arms.add_argument("data", type=Path, nargs="+", help="folders `loramix experts discover` made of the same rows")
    arms.add_argument("--work", type=Path, required=True, help="folder for the runs")
    arms.add_argument("--random", action="store_true", help="also MoA on labels dealt out at random")
    arms.add_argument("--json", action="store_true", help="print one JSON object")
    arms.add_argument("--set", action="append", default=[], help="a setting over the recipe's: data.max_length=192")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.verb == "rows":
        from loramix.corpus import rooted
        from loramix.data.demo import demo_data
        from loramix.experiment import read_yaml

        if arguments.recipe:
            sources = rooted(read_yaml(arguments.recipe)["data"]["domains"], arguments.root)
        else:
            sources = {domain: str(folder) for domain, folder in demo_data().items()}
        write_rows(arguments.folder, sources, arguments.train, arguments.test)
        return
    experiment, runs = trained(arguments.data, arguments.work, arguments.set, at_random=arguments.random)
    found = measure(experiment, runs, held_out(arguments.data))
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    domains = sorted({domain for sums in found.values() for domain in sums} - {"all rows"})
    heads = [*domains, "all rows"]
    table = [
        [way, *(f"{math.exp(sums[one]['nll'] / sums[one]['tokens']):.3f}" for one in heads)]
        for way, sums in found.items()
    ]
    print_table("Perplexity of held-out responses, by true domain", ["labels", *heads], table)


if __name__ == "__main__":
    main()
