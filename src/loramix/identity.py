"""What makes two runs the same run: settings that what is learned depends on, the base, the encoded data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from loramix.data.collation import Example
from loramix.models.fingerprint import fingerprint
from loramix.preparation import Prepared

_ELSEWHERE = ("output_dir", "model_name_or_path", "fsdp", "dp_replicate_size")
"""Where things lie: what lies there is compared itself. How the base is dealt out changes sums in their last bits, as
the number of processes does."""
_DATA_ELSEWHERE = ("domains", "root", "path", "unseen")
_STAGES = ("training", "expert_stage", "joint_stage")
_WITHOUT_EFFECT = ("save_steps", "save_total_limit", "dataloader_num_workers")


def identity(prepared: Prepared) -> dict[str, Any]:
    """Returns what must be equal for a run to go on: nested JSON."""
    settings = prepared.experiment.model_dump(mode="json", exclude=set(_ELSEWHERE))
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in _DATA_ELSEWHERE}
    for stage in _STAGES:
        settings[stage] = {key: value for key, value in settings[stage].items() if key not in _WITHOUT_EFFECT}
    data = {
        domain: {"train": _examples(prepared.train[domain]), "test": _examples(prepared.held[domain])}
        for domain in prepared.domains
    }
    return {"settings": settings, "base": fingerprint(prepared.base), "data": data}


def _examples(examples: Sequence[Example]) -> str:
    found = hashlib.sha256()
    for example in examples:
        encoded = example.encoded
        found.update(f"{example.domain_id} {encoded.prompt_length} {encoded.input_ids} {encoded.supervised};".encode())
    return f"{len(examples)} rows {found.hexdigest()[:16]}"
