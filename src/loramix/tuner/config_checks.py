"""What of an adapter's settings does not go together: backend and routing, abstention and routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from loramix.errors import did_you_mean
from loramix.methods import Method
from loramix.routers import RouterConfig
from loramix.routers.abstention import AbstentionConfig

RANK_STEP = 4
"""What grouped GEMMs in fp32 need a rank to be a multiple of (16 bytes)."""


def backend_problems(backend: str, method: str, router: RouterConfig | None, r: int | None, rank: int) -> list[str]:
    """Returns why a backend cannot serve a method.

    Args:
        backend: a name in `experts.apply.BACKENDS`, or "auto".
        method: its name.
        router: its router's settings, if it routes.
        r: as set.
        rank: of one expert.
    """
    found = []
    by_token = router is not None and router.level == "token"
    if backend == "grouped" and not by_token:
        found.append(f"backend = 'grouped' needs routing by token; method {method} has none. Use 'auto'.")
    if backend == "grouped" and rank % RANK_STEP:
        found.append(
            f"r = {r}: backend 'grouped' needs experts of a rank that is a multiple of {RANK_STEP} (of 8 in 16-bit "
            "types). Round it up, or use 'concat'."
        )
    if backend == "per_sequence" and by_token:
        found.append(f"backend = 'per_sequence' needs one decision a sequence; {method} routes by token. Use 'auto'.")
    return found


def abstention_problems(given: Mapping[str, Any] | None, method: Method, router: Mapping[str, Any] | None) -> list[str]:
    """Returns what is wrong with a calibration's settings.

    Args:
        given: the adapter's `abstention`.
        method: whose adapter it is.
        router: the resolved settings of its router.
    """
    if given is None:
        return []
    if method.settled_by != "prompt" or (router or {}).get("reads") != "base":
        return [
            f"abstention: method {method.name} with router.reads = {(router or {}).get('reads')!r} has no reading of "
            "the prompt by the base, which it needs. Leave it out."
        ]
    known = [one.name for one in fields(AbstentionConfig)]
    unknown = [
        f"abstention.{key}: no such setting. Expected {', '.join(known)}.{did_you_mean(key, known)}"
        for key in given
        if key not in known
    ]
    missing = [key for key in known if key not in given]
    if unknown or missing:
        lacking = f"abstention: {', '.join(missing)} missing. It is written by `loramix calibrate`; leave it to that."
        return unknown + ([lacking] if missing else [])
    return AbstentionConfig(**given).problems()


def name_problems(experts: Sequence[str], method: Method) -> list[str]:
    """Returns which names of experts cannot be used."""
    found = []
    repeated = sorted({name for name in experts if list(experts).count(name) > 1})
    if repeated:
        found.append(f"experts: {', '.join(repeated)} given more than once. Expected distinct names.")
    if "base" in experts and method.settled_by == "prompt":
        found.append("experts: 'base' stands for the base alone in a routing. Give the expert another name.")
    return found


def accepted_settings(name: str, default: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns what of some settings a frozen value of a method has and is of the right type, and what is wrong with the
    rest.

    Args:
        name: of the settings, for messages.
        default: the frozen value.
        given: settings by name.
    """
    types = get_type_hints(type(default))
    accepted: dict[str, Any] = {}
    wrong = []
    for key, value in given.items():
        if key not in types:
            near = did_you_mean(str(key), types)
            wrong.append(f"{name}.{key}: no such setting. Expected {', '.join(types)}.{near}")
            continue
        try:
            accepted[key] = TypeAdapter(types[key], config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            wrong.append(f"{name}.{key} = {value!r:.60}: {said[0].lower()}{said[1:]}.")
    return accepted, wrong
