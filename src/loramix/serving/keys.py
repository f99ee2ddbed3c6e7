"""Who may use the server, and which experts.

A key opens every route. One that lists experts has the others masked out before any router chooses: a prompt can steer
a router, so what the router chooses is no access control.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramix.errors import ConfigError, Problems, did_you_mean
from loramix.tuner.abstaining import BASE
from loramix.yaml_text import NotReadable, parse_yaml

VARIABLE = "LORAMIX_API_KEY"
FEWEST_CHARS = 16


@dataclass(frozen=True)
class Key:
    """One key, of which only the digest is kept.

    Attributes:
        name: for the log; never the key itself.
        digest: sha256 of the key.
        experts: the experts it may use, "base" among them if the base; None for all.
    """

    name: str
    digest: bytes
    experts: frozenset[str] | None = None


class Keys:
    """The keys of a server; none at all means that everybody who reaches it may use it."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def found(self, authorization: str | None) -> Key | None:
        """Returns the key that a request carries, or None if it carries none of ours.

        Args:
            authorization: the header: "Bearer KEY", or Basic with the key as password, which browsers ask for.
        """
        digest = hashlib.sha256(_presented(authorization or "")).digest()
        match = None
        for key in self._keys:  # all of them, each in constant time: how long it takes says nothing
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match


def _presented(header: str) -> bytes:
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def read_keys(file: Path | None, environment: Mapping[str, str], experts: Sequence[str]) -> Keys:
    """Returns the keys of a file, and of the environment variable LORAMIX_API_KEY.

    Args:
        file: YAML with a list `keys`, each with `key`, and optionally `name` and `experts`; None for none.
        environment: of the process.
        experts: the experts there are, empty where none can be told apart.

    Raises:
        ConfigError: all that is wrong with the file and the variable.
    """
    problems = Problems("the keys")
    entries: list[tuple[str, Any]] = []
    if VARIABLE in environment:
        entries.append((VARIABLE, {"key": environment[VARIABLE], "name": VARIABLE}))
    if file is not None:
        entries += [(f"{file}: keys[{n}]", entry) for n, entry in enumerate(_listed(file))]
    keys = [key for where, entry in entries if (key := _key(where, entry, experts, problems)) is not None]
    if len({key.digest for key in keys}) < len(keys):
        problems.add("a key is there twice. Give each user a key of their own.")
    problems.raise_as(ConfigError)
    return Keys(keys)


def _listed(file: Path) -> list[Any]:
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, NotReadable) as error:
        raise ConfigError(f"{file}: the keys cannot be read ({str(error).splitlines()[0]}).") from error
    if file.stat().st_mode & 0o077:
        raise ConfigError(f"{file}: other users of this machine can read the keys. Run `chmod 600 {file}`.")
    if not isinstance(content, dict) or list(content) != ["keys"] or not isinstance(content["keys"], list):
        raise ConfigError(f'{file}: expected a list "keys" and nothing else, each entry with key, name and experts.')
    return content["keys"]


def _key(where: str, entry: Any, experts: Sequence[str], problems: Problems) -> Key | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        problems.add(f"{where}: expected an entry with a text as key.")
        return None
    for name in entry.keys() - {"key", "name", "experts"}:
        problems.add(f"{where}.{name}: no such setting. Expected key, name and experts.")
    if len(entry["key"]) < FEWEST_CHARS:
        problems.add(f"{where}: a key of {len(entry['key'])} characters can be guessed. Use {FEWEST_CHARS} or more.")
    allowed = entry.get("experts")
    if allowed is not None and (not isinstance(allowed, list) or not allowed):
        problems.add(f"{where}.experts: expected a list of experts, or nothing for all.")
        allowed = None
    if allowed is not None and not experts:
        problems.add(
            f"{where}.experts: this method mixes unnamed experts token by token, so none can be kept from a key. "
            "Serve it to keys without experts, or serve a sequence-routed run."
        )
    for name in allowed or [] if experts else []:
        if name not in experts and name != BASE:
            near = did_you_mean(str(name), experts)
            problems.add(f"{where}.experts: {name!r}: no such expert. Expected {', '.join(experts)} or {BASE}.{near}")
    digest = hashlib.sha256(entry["key"].encode()).digest()
    return Key(str(entry.get("name") or where), digest, None if allowed is None else frozenset(map(str, allowed)))
