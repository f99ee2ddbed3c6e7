"""Adapters by Hub name: two named files are fetched, as plain files, and nothing else of the repository."""

from __future__ import annotations

import re
from pathlib import Path

from loramix.adapters.suspicion import CONFIG, TENSORS
from loramix.cache import cache_dir
from loramix.errors import ModelError


def adapter_folder(name: str) -> Path:
    """Returns the folder of an adapter: the one that is named, or what was fetched from the Hub.

    Raises:
        ModelError: there is no such folder, and no repository that can be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name or name.startswith("."):
        raise ModelError(f"{name!r}: no such folder. Expected an adapter's folder, or a Hub name (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    target = cache_dir() / "adapters" / name.replace("/", "--")
    try:
        snapshot_download(name, allow_patterns=[CONFIG, TENSORS], local_dir=target)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{name!r}: no such folder, and not to be had from the Hub ({first}). Expected an adapter's folder, or a "
            "Hub name that can be reached."
        ) from error
    return target
