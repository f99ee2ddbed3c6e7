"""What a base's settings may name: no code that comes with it, unless the caller says so for this base.

transformers runs Python files beside a model that its `auto_map` names, where it is allowed to, and asks on the
terminal where nothing is said; it fetches attention kernels that a config names. A file is never given that say.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loramix.errors import ModelError, Problems

VARIABLE = "LORAMIX_TRUST_REMOTE_CODE"
"""Names, separated by commas, of the bases whose own code may be run; each as in model_name_or_path."""
FILES = ("config.json", "tokenizer_config.json")
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
INTERNAL_KEYS = ("_attn_implementation_internal", "_experts_implementation_internal")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def trusted(name: str) -> bool:
    """Returns whether the caller said in the environment that a base's own code may be run."""
    return name in [one.strip() for one in os.environ.get(VARIABLE, "").split(",")]


def check_base(name: str, where: str) -> None:
    """Checks that the settings of a base name no code.

    Args:
        name: as the caller wrote it.
        where: folder or Hub name; the Hub's settings are fetched.

    Raises:
        ModelError: with every key that names code, unless the base is trusted.
        OSError: the Hub gives no such model.
    """
    if trusted(name):
        return
    problems = Problems(f"model_name_or_path = {name!r}")
    for file in FILES:
        found = _file(where, file)
        if found is None:
            continue
        for key, value in _pairs(_content(found)):
            if key in CODE_KEYS + INTERNAL_KEYS:
                problems.add(f"{file}: {key} names code that comes with the model, which is not run. {_advice(name)}")
            elif key in KERNEL_KEYS and "/" in str(value):
                problems.add(f"{file}: {key} = {value!r} names code to fetch, which is not run. {_advice(name)}")
    problems.raise_as(ModelError)


def read_settings(file: Path) -> dict[str, Any]:
    """Returns the settings in a JSON file of a base.

    Raises:
        ModelError: it is no JSON object.
    """
    content = _content(file)
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds {type(content).__name__}, expected settings by name. Get the model anew.")
    return content


def _advice(name: str) -> str:
    return (
        f"Take it out if transformers knows this kind of model itself; or read that code and, if you trust it, say so "
        f"with {VARIABLE}={name}"
    )


def _file(where: str, file: str) -> Path | None:
    if Path(where).is_dir():
        found = Path(where) / file
        return found if found.is_file() else None
    from transformers.utils import cached_file

    fetched = cached_file(where, file, _raise_exceptions_for_missing_entries=False)
    return Path(fetched) if fetched else None


def _content(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is no JSON ({str(error).splitlines()[0][:200]}). Get the model anew.") from error


def _pairs(content: Any, depth: int = 0) -> list[tuple[str, Any]]:
    """Returns all keys with their values, however deep."""
    if depth > 20 or not isinstance(content, dict | list):
        return []
    if isinstance(content, list):
        return [pair for one in content for pair in _pairs(one, depth + 1)]
    below = [pair for value in content.values() for pair in _pairs(value, depth + 1)]
    return [*((str(key), value) for key, value in content.items()), *below]
