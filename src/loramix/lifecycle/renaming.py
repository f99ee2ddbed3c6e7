"""What was measured of a run's experts, after one of them got another name or left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Change = Callable[[str], str | None]


def renamed_in(content: dict[str, Any], change: Change) -> dict[str, Any]:
    """Returns the content of results.json or abstention.json with experts renamed, or without those that left.

    Where one left, what counts all domains together holds no more and is left out: routers chose among more experts.

    Args:
        content: of the file.
        change: name -> its new name, or None for one that left.
    """
    named = {key: _named(value, change) for key, value in content.items()}
    domains = content.get("domains") or []
    if not any(change(name) is None for name in domains):
        return named
    return {key: value for key, value in named.items() if not key.startswith("router_")}


def _named(value: Any, change: Change) -> Any:
    if isinstance(value, dict) and "domain" in value:  # a row: its keys are no names
        return {key: change(one) if key in ("domain", "expert") else one for key, one in value.items()}
    if isinstance(value, dict):
        return {to: _named(one, change) for key, one in value.items() if (to := change(key)) is not None}
    if isinstance(value, list):
        if all(isinstance(one, str) for one in value):
            return [to for one in value if (to := change(one)) is not None]
        kept = [one for one in value if not (isinstance(one, dict) and _left(one.get("domain"), change))]
        return [_named(one, change) for one in kept]
    return value


def _left(name: Any, change: Change) -> bool:
    return isinstance(name, str) and change(name) is None
