"""A few training prompts of each domain, kept with a run: what its routers need to learn a new expert beside the old.

One line a prompt: {"domain": NAME, "input_ids": [...]}, the prompt alone, as the base reads it. No response is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loramix.data.collation import Example
from loramix.errors import DataError
from loramix.run_folder import write_text_safely


def prompts_of(examples: Sequence[Example], most: int) -> list[list[int]]:
    """Returns the prompts of the first examples; their order is the seed's, so they are a random sample."""
    return [list(e.encoded.input_ids[: e.encoded.prompt_length]) for e in examples[:most]]


def write_prompts(file: Path, prompts: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Writes the store; none where there is nothing to keep."""
    lines = [
        json.dumps({"domain": domain, "input_ids": list(ids)}, ensure_ascii=False)
        for domain, some in prompts.items()
        for ids in some
    ]
    if lines:
        write_text_safely(file, "\n".join(lines) + "\n")
    else:
        file.unlink(missing_ok=True)


def read_prompts(file: Path) -> dict[str, list[list[int]]]:
    """Returns the stored prompts by domain; empty where none were kept.

    Raises:
        DataError: the file is damaged.
    """
    found: dict[str, list[list[int]]] = {}
    if not file.is_file():
        return found
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            found.setdefault(str(row["domain"]), []).append([int(one) for one in row["input_ids"]])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file}, line {number}: no stored prompt (domain and input_ids). Remove the file to go on without it."
            ) from error
    return found
