"""An export on the Hugging Face Hub, by the Hub's own client."""

from __future__ import annotations

import json
from pathlib import Path

from loramix.errors import ModelError
from loramix.lifecycle.export import MANIFEST, is_export, read_export


def push_export(folder: Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads an export, after reading it back, and returns its address.

    Args:
        folder: what `export_experts` wrote.
        repository: owner/name; made if it is not there.
        private: of a repository that is made.
        revision: branch.

    Raises:
        ModelError: the folder is no whole export, or the Hub refuses; the token is the client's own (`hf auth login`).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if not is_export(folder):
        raise ModelError(f"{folder}: no {MANIFEST} here. Export a run first: loramix export RUN --output-dir {folder}.")
    read_export(folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    listed = [*manifest["sha256"], MANIFEST, "README.md"]  # whatever else lies in the folder stays here
    client = HfApi()
    try:
        client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=str(folder), revision=revision, allow_patterns=listed)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{repository}: the Hub did not take it ({first}). Check the name, and log in with `hf auth login`."
        ) from error
    return f"https://huggingface.co/{repository}"
