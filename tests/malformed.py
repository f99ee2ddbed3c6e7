"""120 data files that are wrong, each in its own way, with what has to be said about it."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from dataclasses import dataclass

import pyarrow
from pyarrow import parquet

GOOD = {"prompt": "Say hi.", "completion": "Hi."}
PLACE = r":(\d+|item \d+|row \d+): "


@dataclass(frozen=True)
class Malformed:
    """A file's name and content, and what has to be said about it: a regular expression that follows its name."""

    name: str
    content: bytes
    said: str


def _line(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def _turns(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


_USER, _REPLY = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}
_EMPTY = {"role": "assistant", "content": " "}
ROWS: dict[str, tuple[object, str]] = {
    "cut": (b'{"prompt": "a", "completion": "b', "not JSON"),
    "no quotes": (b"{prompt: a, completion: b}", "not JSON"),
    "single quotes": (b"{'prompt': 'a', 'completion': 'b'}", "not JSON"),
    "comma": (b'{"prompt": "a", "completion": "b",}', "not JSON"),
    "two objects": (b'{"prompt": "a", "completion": "b"} {"prompt": "c", "completion": "d"}', "Extra data"),
    "comment": (b"// a remark", "not JSON"),
    "nul": (b'{"prompt": "a\x00", "completion": "b"}', "control character"),
    "nuls": (b"\x00" * 64, "not JSON"),
    "latin-1": ('{"prompt": "é", "completion": "b"}'.encode("latin-1"), "not UTF-8"),
    "cut character": (b'{"prompt": "\xe2\x82", "completion": "b"}', "not UTF-8"),
    "surrogate": (b'{"prompt": "\\ud800", "completion": "b"}', "half of a character"),
    "surrogate answer": (b'{"prompt": "a", "completion": "\\udfff"}', "half of a character"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b', "completion": "b"}', "nested"),
    "deep unclosed": (b"[" * 200_000, "not JSON"),
    "deep objects": (b'{"a":' * 500 + b"1" + b"}" * 500, "nested"),
    "long": (b'{"prompt": "' + b"a" * 10_000_000 + b'", "completion": "b"}', "longer than"),
    "digits": (b'{"prompt": ' + b"9" * 10_000 + b', "completion": "b"}', "digits"),
    "a list": (["a", "b"], "is list, expected an object"),
    "a number": (7, "is int, expected an object"),
    "a text": ("a", "is str, expected an object"),
    "null": (None, "is NoneType, expected an object"),
    "no fields": ({}, "has the fields none"),
    "other fields": ({"foo": "a", "bar": "b"}, "has the fields bar, foo"),
    "no answer": ({"prompt": "a"}, "has the fields prompt"),
    "empty answer": ({"prompt": "a", "completion": " \n"}, "is empty"),
    "null answer": ({"prompt": "a", "completion": None}, "NoneType, expected text"),
    "answer of numbers": ({"prompt": "a", "completion": 3.5}, "float, expected text"),
    "prompt of objects": ({"prompt": {"a": 1}, "completion": "b"}, "dict, expected text"),
    "messages of text": ({"messages": "hi"}, "expected a list of turns"),
    "no messages": ({"messages": []}, "expected a list of turns"),
    "turn of text": (_turns("hi", "ho"), "turn 1 is not of the form"),
    "wrong role": (_turns({"role": "robot", "content": "a"}, _REPLY), "expected one of"),
    "role of numbers": (_turns({"role": 3, "content": "a"}, _REPLY), "expected one of"),
    "no role": (_turns({"content": "a"}, _REPLY), "turn 1 is not of the form"),
    "content of parts": (_turns({"role": "user", "content": [{"type": "image"}]}, _REPLY), "type list, expected text"),
    "no reply": (_turns(_USER), "has no assistant turn"),
    "empty reply": (_turns(_USER, _EMPTY), "empty assistant turn"),
    "reply first": (_turns(_REPLY, _USER), "begins with an assistant turn"),
    "tools that are no JSON": ({**_turns(_USER, _REPLY), "tools": "{"}, "not JSON"),
    "deep tools": ({**_turns(_USER, _REPLY), "tools": "[" * 100_000}, "not JSON"),
    "history of texts": ({"instruction": "a", "output": "b", "history": ["a"]}, "history"),
    "wrong sharegpt": ({"conversations": [{"from": "alien", "value": "a"}]}, "expected one of"),
}
WHOLE_JSON: dict[str, tuple[bytes, str]] = {
    "cut": (b'[{"prompt": "a", "completion": "b"}', "not JSON"),
    "empty": (b"", "not JSON"),
    "a number": (b"7", "holds no list"),
    "an object": (b'{"rows": []}', "holds no list"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested"),
    "deep objects": (b'{"data":' * 100 + b"[]" + b"}" * 100, "nested"),
    "utf-16": ("[]".encode("utf-16"), "not UTF-8"),
    "items that are texts": (b'["a", "b"]', "is str, expected an object"),
    "item without answer": (json.dumps([GOOD, {"prompt": "a"}]).encode(), "has the fields"),
    "digits": (b"[" + b"9" * 10_000 + b"]", "digits"),
}
CSV: dict[str, tuple[bytes, str]] = {
    "open quote": (b'prompt,completion\na,"b\n' + b"c,d\n" * 50_000, "cannot be read"),
    "open quote at the end": (b'prompt,completion\na,b\nc,"d\n', "cannot be read"),
    "field too many": (b"prompt,completion\na,b\nc,d,e\n", "has 3 fields, expected 2"),
    "field too few": (b"prompt,completion\na,b\nc\n", "has 1 fields, expected 2"),
    "latin-1": ("prompt,completion\na,b\né,d\n".encode("latin-1"), "not UTF-8"),
    "utf-16": ("prompt,completion\na,b\n".encode("utf-16"), "not UTF-8|byte that is zero"),
    "no header": (b"a question,an answer\nanother,one\n", "has the fields"),
    "columns twice": (b"prompt,prompt,completion\na,b,c\n", "twice"),
    "semicolons": (b"prompt;completion\na;b\n", "has the fields"),
    "long line": (b"prompt,completion\na,b\n" + b"a" * 9_000_000 + b",b\n", "longer than"),
    "long field": (b"prompt,completion\na," + b"b" * 200_000 + b"\n", "field larger"),
    "empty answer": (b"prompt,completion\na,\n", "is empty"),
    "nuls": (b"\x00" * 1000, "byte that is zero"),
}


def _table(**columns: list[object]) -> bytes:
    held = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), held)
    return held.getvalue()


def _parquet() -> dict[str, tuple[bytes, str]]:
    good = _table(prompt=["a"] * 3000, completion=["b"] * 3000)
    damaged = bytearray(good)
    damaged[20:60] = b"\xff" * 40
    return {
        "empty": (b"", "not parquet"),
        "text": (b"prompt,completion\na,b\n", "not parquet"),
        "cut": (good[: len(good) // 2], "not parquet"),
        "magic only": (b"PAR1" * 4, "not parquet"),
        "damaged": (bytes(damaged), "not parquet"),
        "other columns": (_table(a=["x"], b=["y"]), "has the fields a, b"),
        "numbers": (_table(prompt=[1], completion=[2]), "int, expected text"),
        "nulls": (_table(prompt=["a", None], completion=["b", "c"]), "NoneType, expected text"),
        "bytes": (_table(prompt=[b"\xff"], completion=[b"b"]), "bytes, expected text"),
    }


def _zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.jsonl", b"\0" * 50_000_000)
    return held.getvalue()


def malformed() -> list[Malformed]:
    """Returns them all: rows in the first and in a later line, whole files, tables, archives."""
    found = []
    for title, (row, said) in ROWS.items():
        for place in (1, 3):
            lines = [_line(GOOD)] * 4
            lines[place - 1] = _line(row)
            name = f"{title.replace(' ', '-')}-{place}.jsonl"
            found.append(Malformed(name, b"\n".join(lines) + b"\n", rf":{place}: .*({said})"))
    tables = {".json": WHOLE_JSON, ".csv": CSV, ".parquet": _parquet()}
    for ending, cases in tables.items():
        for title, (content, said) in cases.items():
            found.append(Malformed(f"{title.replace(' ', '-')}{ending}", content, f"{PLACE}.*({said})"))
    unknown = r": ending .* is not known"
    found += [
        Malformed("bomb.zip", _zipped(), unknown),
        Malformed("bomb.jsonl.gz", gzip.compress(b"\0" * 50_000_000), unknown),
        Malformed("pickled.pkl", b"\x80\x04K\x01.", unknown),
        Malformed("zip-called.jsonl", _zipped(), r":\d+: .*(not UTF-8|not JSON)"),
    ]
    return found
