"""Reads YAML that may come from anybody: plain values only, and no more of them than settings can need."""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 100_000
"""With every alias written out. Ten lines of aliases of aliases make a billion."""
DEEPEST = 50


class NotReadable(ValueError):
    """A text is no YAML, or not such as is read; says why, in one line."""


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text: mappings, lists, texts, numbers, dates, True, False, None.

    Raises:
        NotReadable: no YAML, a tag that names anything else, or more or deeper values than are read.
    """
    if len(text) > MOST_CHARACTERS:
        raise NotReadable(f"it has {len(text)} characters, more than the {MOST_CHARACTERS} that are read.")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 1)
        return loader.construct_document(node)
    except RecursionError as error:
        raise NotReadable(f"it is nested deeper than the {DEEPEST} levels that are read.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as a date that is none, digits without end
        raise NotReadable(" ".join(str(error).split())[:300]) from error


def _count(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Returns how many values a node holds with every alias written out."""
    if depth > DEEPEST:
        raise NotReadable(f"it is nested deeper than the {DEEPEST} levels that are read.")
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise NotReadable(f"line {node.start_mark.line + 1}: an alias stands for what it is part of.")
        return found
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        parts = [one for pair in node.value for one in pair]
    else:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
    total = 1 + sum(_count(part, known, depth + 1) for part in parts)
    if total > MOST_VALUES:
        raise NotReadable(f"its aliases stand for more than the {MOST_VALUES} values that are read.")
    known[id(node)] = total
    return total
