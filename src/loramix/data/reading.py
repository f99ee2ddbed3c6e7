"""Reads files of rows: jsonl, json, csv, tsv, parquet, a folder of splits, or a Hub data set. Bad lines are named."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

from loramix.data.formats import to_records
from loramix.data.json_text import NotJson, parse_json
from loramix.data.lines import TOO_LONG, lines_of
from loramix.data.records import Record
from loramix.data.row_error import FileError, Numbered, RowError
from loramix.data.tables import separated
from loramix.errors import DataError, Problems

MOST_JSON_BYTES = 1 << 30
SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}


def _jsonl(path: Path) -> Numbered:
    for number, raw in lines_of(path):
        place = str(number)
        if raw is None:
            yield place, FileError(place, TOO_LONG)
            continue
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield place, FileError(place, f"is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.")
            continue
        if line.strip():
            try:
                yield place, parse_json(line)
            except NotJson as error:
                column = f", column {error.column}" if error.column else ""
                shown = line.strip()[:40]
                said = f"is not JSON: {error.reason}{column}, in {shown!r}. Expected one object a line."
                yield place, FileError(place, said)


def _json(path: Path) -> Numbered:
    if path.stat().st_size > MOST_JSON_BYTES:
        raise FileError("1", f"is longer than {MOST_JSON_BYTES >> 20} MiB, and is read as a whole. Save it as .jsonl.")
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except NotJson as error:
        if error.reason == "Extra data" and error.line > 1:  # JSON lines under the wrong ending
            yield from _jsonl(path)
            return
        raise FileError(str(error.line), f"is not JSON: {error.reason}. Expected a list of objects.") from error
    except UnicodeDecodeError as error:
        raise FileError("1", f"is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    rows = (
        next((content[k] for k in ("data", "example") if k in content), None) if isinstance(content, dict) else content
    )
    if not isinstance(rows, list):
        raise FileError("1", 'holds no list. Expected a list of objects, or {"data": [...]}.')
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def _parquet(path: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise FileError(f"row {number + 1}", f"is not parquet: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".parquet": _parquet,
}


def find_split(path: Path, split: str) -> Path | None:
    """Returns the file of a split in a folder, or None; for a plain file the file itself, for "train" only."""
    if path.is_file():
        return path if split == "train" else None
    for stem in SPLITS[split]:
        for suffix in READERS:
            if (path / f"{stem}{suffix}").is_file():
                return path / f"{stem}{suffix}"
    return None


def read_file(path: Path, problems: Problems, *, domain: str | None, domain_column: str | None = None) -> list[Record]:
    """Returns the records of one file; what is wrong with it goes to `problems`, by file and line.

    Args:
        path: a file with one of the known endings.
        problems: collects what cannot be used.
        domain: the label of the whole file, or None.
        domain_column: the column with the label, or None to look for one.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        problems.add(f"{path}: ending {path.suffix!r} is not known. Expected one of {', '.join(READERS)}.")
        return []
    records = []
    try:
        for place, row in reader(path):
            source = f"{path}:{place}"
            if isinstance(row, FileError):
                problems.add(f"{path}:{row}")
                continue
            try:
                records += to_records(row, source, domain, domain_column)
            except RowError as error:
                problems.add(f"{source}: {error}")
    except FileError as error:
        problems.add(f"{path}:{error}")
    except OSError as error:
        problems.add(f"{path}: cannot be read ({error.strerror}).")
    return records


def read_source(
    name: str, split: str, problems: Problems, *, domain: str | None, domain_column: str | None = None
) -> list[Record] | None:
    """Returns the records of one split of a file, folder or Hub data set; None where it has no such split.

    Args:
        name: path, pattern of files with *, or Hub name such as "owner/name" or "owner/name:subset". A file, and the
            files of a pattern together, are one table: split "train" only.
        split: "train", "validation" or "test".
        problems, domain, domain_column: as for `read_file`.
    """
    path = Path(name).expanduser()
    if "*" in name:
        if split != "train":
            return None
        found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True)) if Path(one).is_file()]
        if not found:
            problems.add(f"{name}: no file is of that pattern.")
        how = {"domain": domain, "domain_column": domain_column}
        return [record for one in found for record in read_file(one, problems, **how)]
    if path.exists():
        file = find_split(path, split)
        if file is None:
            return None
        return read_file(file, problems, domain=domain, domain_column=domain_column)
    here = path.suffix.lower() in READERS or name.startswith((".", "/", "~"))
    if here or name.count("/") != 1 or path.parent.is_dir():
        if split == "train":
            problems.add(f"{name}: no such file or folder. Expected a data file, a folder of splits, or a Hub name.")
        return None
    return _from_hub(name, split, problems, domain=domain, domain_column=domain_column)


def read_named_for(name: str, split: str, problems: Problems, *, domain: str | None) -> list[Record]:
    """Returns the records of a source that the user named for a split: all of a file or pattern, whatever it is called;
    that split of a folder or a Hub data set, and of nothing else, so that no row is both learned and measured."""
    whole = "*" in name or Path(name).expanduser().is_file()
    count = len(problems.messages)
    records = read_source(name, "train" if whole else split, problems, domain=domain)
    if records is None and len(problems.messages) == count:
        problems.add(f"{name}: no such file, and no folder or Hub data set with a {split} part.")
    return records or []


def _from_hub(
    name: str, split: str, problems: Problems, *, domain: str | None, domain_column: str | None
) -> list[Record] | None:
    from datasets import get_dataset_split_names, load_dataset

    repository, _, subset = name.partition(":")
    try:
        have = get_dataset_split_names(repository, subset or None)
        found = next((one for one in SPLITS[split] if one in have), None)
        if found is None:
            return None
        rows = load_dataset(repository, subset or None, split=found)
    except Exception as error:
        problems.add(f"{name}: neither a file here nor a data set the Hub gives ({str(error).splitlines()[0]}).")
        return None
    records = []
    for number, row in enumerate(rows, 1):
        source = f"{name}[{found}]:row {number}"
        try:
            records += to_records(row, source, domain, domain_column)
        except RowError as error:
            problems.add(f"{source}: {error}")
    return records


def raise_data(problems: Problems) -> None:
    """Raises the collected problems as a DataError."""
    problems.raise_as(DataError)
