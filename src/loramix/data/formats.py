"""Recognises the shape of a row by its keys and turns it into a Record.

Accepted: messages (OpenAI), conversations (sharegpt), instruction/input/output (alpaca), prompt/completion and their
aliases, text + label, questions with options (choices.py), and rows of some public data sets (layouts.py). A row that
fits none is refused with the keys it has and the keys that are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loramix.data.choices import is_choice, read_choice
from loramix.data.json_text import NotJson, parse_json
from loramix.data.layouts import rows_of
from loramix.data.records import Message, Record
from loramix.data.row_error import RowError

DOMAIN_COLUMNS = ("domain", "task", "channel", "task_id")
PROMPTS = ("prompt", "query", "question", "input", "instruction", "problem")
RESPONSES = ("completion", "response", "answer", "output", "target", "chosen_response")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
ROLES = ("system", "user", "assistant", "tool")

Row = Mapping[str, Any]


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f'"{key}" is {type(value).__name__}, expected text. Quote it.')
    return value


def _response(row: Row, key: str) -> Message:
    text = _text(row, key)
    if not text.strip():
        raise RowError(f'"{key}" is empty: there is nothing to learn. Remove the row, or write the response.')
    return Message("assistant", text)


def _turn(turn: Any, number: int, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        raise RowError(f'turn {number} is not of the form {{"{role_key}": ..., "{text_key}": ...}}. Got {turn!r:.60}.')
    role = turn[role_key]
    if turn.get("tool_calls"):
        raise RowError(
            f"turn {number} has tool_calls, which loramix does not render. Write the call into its {text_key}."
        )
    if not isinstance(role, str) or role not in roles:
        raise RowError(f'turn {number} has "{role_key}" = {role!r}, expected one of {", ".join(roles)}.')
    if not isinstance(turn[text_key], str):
        raise RowError(f'turn {number} has "{text_key}" of type {type(turn[text_key]).__name__}, expected text.')
    return Message(roles[role], turn[text_key])


def _conversation(turns: Any, key: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise RowError(f'"{key}" is {type(turns).__name__}, expected a list of turns with at least one.')
    messages = tuple(_turn(turn, i, role_key, text_key, roles) for i, turn in enumerate(turns, 1))
    opening = next(message for message in (*messages, Message("none", "")) if message.role != "system")
    if opening.role == "assistant":
        raise RowError(f'"{key}" begins with an assistant turn, which has no prompt. Remove it, or add what was asked.')
    replies = [message for message in messages if message.role == "assistant"]
    if not replies:
        raise RowError(f'"{key}" has no assistant turn: there is nothing to learn. Add the response.')
    if any(not reply.content.strip() for reply in replies):
        raise RowError(f'"{key}" has an empty assistant turn. Remove it, or write the response.')
    return messages


def _messages(row: Row) -> tuple[Message, ...]:
    return _conversation(row["messages"], "messages", "role", "content", {role: role for role in ROLES})


def _sharegpt(row: Row) -> tuple[Message, ...]:
    turns = _conversation(row["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    if row.get("system"):
        return (Message("system", _text(row, "system")), *turns)
    return turns


def _alpaca(row: Row) -> tuple[Message, ...]:
    query = _text(row, "instruction")
    if row.get("input"):
        query += "\n" + _text(row, "input")
    before = [Message("system", _text(row, "system"))] if row.get("system") else []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p.strip() for p in pair):
            raise RowError('"history" holds something other than [question, answer] pairs of texts.')
        before += [Message("user", pair[0]), Message("assistant", pair[1])]
    return (*before, Message("user", query), _response(row, "output"))


def _text_label(row: Row) -> tuple[Message, ...]:
    label = {**row, "label": str(row["label"])} if isinstance(row["label"], int) else row
    return (Message("user", _text(row, "text")), _response(label, "label"))


def _pair(row: Row) -> tuple[Message, ...]:
    prompt = next(key for key in PROMPTS if key in row)
    response = next(key for key in RESPONSES if key in row)
    before = (Message("system", _text(row, "system")),) if row.get("system") else ()
    return (*before, Message("user", _text(row, prompt)), _response(row, response))


def _prompt_completion(row: Row) -> tuple[Message, ...]:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        both = {"messages": [*row["prompt"], *row["completion"]]}
        return _messages(both)
    return _pair(row)


def _reader(row: Row) -> Callable[[Row], tuple[Message, ...]] | None:
    if "messages" in row:
        return _messages
    if "conversations" in row:
        return _sharegpt
    if "instruction" in row and "output" in row:
        return _alpaca
    if "prompt" in row and "completion" in row:
        return _prompt_completion
    if any(key in row for key in PROMPTS) and any(key in row for key in RESPONSES):
        return _pair
    if "text" in row and "label" in row:
        return _text_label
    return None


def to_records(row: Any, source: str, domain: str | None, domain_column: str | None) -> list[Record]:
    """Returns the records of one row, mostly one; arguments and errors as of `to_record`."""
    if domain is None and isinstance(row, Mapping):  # a layout keeps no other columns
        domain = _label(row, domain_column)
    rows = rows_of(row)
    if len(rows) == 1:
        return [to_record(rows[0], source, domain, None)]
    return [to_record(one, f"{source} ({number})", domain, None) for number, one in enumerate(rows, 1)]


def to_record(row: Any, source: str, domain: str | None, domain_column: str | None) -> Record:
    """Returns the Record of one row.

    Args:
        row: a mapping as read from the file.
        source: "file:line".
        domain: the label the config gives to the whole file, or None.
        domain_column: the column that holds the label; None looks for one of DOMAIN_COLUMNS when `domain` is None.

    Raises:
        RowError: what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"is {type(row).__name__}, expected an object with named fields.")
    label = domain if domain is not None else _label(row, domain_column)
    if is_choice(row):
        prompt, letter, choices = read_choice(row)
        return Record(_whole((Message("user", prompt), Message("assistant", letter))), label, source, choices=choices)
    read = _reader(row)
    if read is None:
        raise RowError(
            f"has the fields {', '.join(sorted(map(str, row))) or 'none'}. Expected messages, conversations, "
            "instruction + output, prompt + completion (or question + answer, ...), text + label, or question + "
            "choices + answer."
        )
    return Record(
        messages=_whole(read(row)),
        domain=label,
        source=source,
        tools=_tools(row.get("tools")),
    )


def _whole(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            half = message.content[error.start]
            raise RowError(
                f"{half!r} is half of a character (a lone surrogate), which no tokenizer takes. Write the whole one."
            ) from error
    return messages


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Returns the tool descriptions: a list of objects, or the same as JSON text."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except NotJson as error:
            raise RowError(f'"tools" is text but not JSON: {error.reason}.') from error
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError('"tools" is not a list of objects. Expected tool descriptions as the chat template takes them.')
    return tuple(tools)


def _label(row: Row, domain_column: str | None) -> str | None:
    columns = (domain_column,) if domain_column else DOMAIN_COLUMNS
    for column in columns:
        if row.get(column) is not None:
            return str(row[column])
    if domain_column:
        raise RowError(
            f'has no "{domain_column}", the column that names the domain. It has {", ".join(map(str, row))}.'
        )
    return None
