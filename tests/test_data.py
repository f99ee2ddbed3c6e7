"""Formats, files, labels, encoding, truncation: what is read, and what each bad input is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loramix import DataError
from loramix.data.collation import Collator
from loramix.data.domains import encode_domain, read_domains
from loramix.data.formats import to_record
from loramix.data.prompts import encode, encode_prompts
from loramix.data.records import Message
from loramix.labels import IGNORED
from tests import tiny

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt and completion": {"prompt": "Q", "completion": "A"},
    "lists of messages": {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
    },
    "question and answer": {"question": "Q", "answer": "A"},
    "text and label": {"text": "Q", "label": "A"},
}


@pytest.mark.parametrize("form", ROWS)
def test_formats_are_recognised(form):
    record = to_record(ROWS[form], "file:1", "d", None)
    assert (record.prompt, record.response, record.domain) == ("Q", "A", "d")


def test_alpaca_joins_its_input_and_history():
    row = {"instruction": "Q", "input": "more", "output": "A", "history": [["q0", "a0"]], "system": "S"}
    record = to_record(row, "file:1", "d", None)
    assert [m.content for m in record.messages] == ["S", "q0", "a0", "Q\nmore", "A"]


@pytest.mark.parametrize("column", ["domain", "task", "channel", "task_id"])
def test_label_columns(column):
    assert to_record({**ROWS["text and label"], column: "law"}, "file:1", None, None).domain == "law"


def _write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


GOOD = '{"prompt": "p", "completion": "c"}\n'
MALFORMED = {
    "not JSON": ("bad.jsonl", GOOD + "{oops\n", ":2: is not JSON"),
    "an array": ("bad.jsonl", GOOD + "[1]\n", ":2: is list, expected an object"),
    "unknown fields": ("bad.jsonl", '{"foo": 1}\n', ":1: has the fields foo. Expected messages"),
    "empty response": ("bad.jsonl", '{"prompt": "p", "completion": " "}\n', ':1: "completion" is empty'),
    "number for text": ("bad.jsonl", '{"prompt": 3, "completion": "c"}\n', ':1: "prompt" is int, expected text'),
    "wrong role": ("bad.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}\n', "expected one of system"),
    "no assistant": ("bad.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "no assistant turn"),
    "role that is a list": (
        "bad.jsonl",
        '{"messages": [{"role": ["user"], "content": "x"}]}\n',
        "expected one of system",
    ),
    "assistant first": (
        "bad.jsonl",
        '{"messages": [{"role": "assistant", "content": "x"}]}\n',
        "begins with an assistant",
    ),
    "tools that are words": (
        "bad.jsonl",
        '{"prompt": "p", "completion": "c", "tools": ["x"]}\n',
        "not a list of objects",
    ),
    "label that is a path": (
        "bad.jsonl",
        '{"prompt": "p", "completion": "c", "domain": "../x"}\n',
        "no name for a domain",
    ),
    "latin-1": ("bad.jsonl", GOOD.encode() + b'{"prompt": "\xe9", "completion": "c"}\n', ":2: is not UTF-8"),
    "deep nesting": ("bad.jsonl", "[" * 100_000 + "\n", ":1: is not JSON: nested too deep"),
    "csv with a missing field": ("bad.csv", "prompt,completion\np,c\nq\n", ":3: has 1 fields, expected 2"),
    "json that is no list": ("bad.json", '{"prompt": 1}', "holds no list"),
    "broken json": ("bad.json", '[{"a": 1},\n{]', ":2: is not JSON"),
    "not parquet": ("bad.parquet", "x", "is not parquet"),
    "unknown ending": ("bad.txt", "x", "ending '.txt' is not known"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_files_are_named_by_file_and_line(what, tmp_path):
    name, text, expected = MALFORMED[what]
    path = _write(tmp_path, name, text)
    labelled = path if "label" in what else None
    with pytest.raises(DataError) as caught:
        read_domains({} if labelled else {"d": path}, labelled=labelled)
    assert f"{path}{expected}" in str(caught.value) or expected in str(caught.value)
    assert path in str(caught.value)


def test_all_problems_of_all_files_at_once(tmp_path):
    bad = _write(tmp_path, "bad.jsonl", "{oops\n" + GOOD + '{"foo": 1}\n')
    with pytest.raises(DataError) as caught:
        read_domains({"one": bad, "two": str(tmp_path / "missing.jsonl")})
    message = str(caught.value)
    assert "3 problems" in message
    assert "bad.jsonl:1" in message
    assert "bad.jsonl:3" in message
    assert "missing.jsonl: no such file" in message


def test_same_rows_from_every_container(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": f"p{i}", "completion": f'c"{i},\nx'} for i in range(5)]
    text = "prompt,completion\n" + "".join(
        f'{r["prompt"]},"{r["completion"].replace(chr(34), chr(34) * 2)}"\n' for r in rows
    )
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    paths = [
        _write(tmp_path, "a.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n"),
        _write(tmp_path, "a.json", json.dumps(rows)),
        _write(tmp_path, "b.json", json.dumps({"data": rows})),
        _write(tmp_path, "a.csv", text),
        str(tmp_path / "a.parquet"),
    ]
    read = [read_domains({"d": path}, seed=3)["d"] for path in paths]
    contents = [[(r.prompt, r.response) for r in split.train + split.test] for split in read]
    assert all(content == contents[0] for content in contents)
    assert sorted(contents[0]) == sorted((r["prompt"], r["completion"]) for r in rows)


def test_folder_of_splits_and_held_out_part(tmp_path):
    sources = tiny.toy_domains(tmp_path, train=10, test=4)
    splits = read_domains(sources, max_train_examples=6)
    assert [(len(s.train), len(s.test)) for s in splits.values()] == [(6, 4)] * 3
    one_file = read_domains({"d": str(tmp_path / "adds" / "train.jsonl")}, test_fraction=0.2)["d"]
    assert (len(one_file.train), len(one_file.test)) == (8, 2)
    assert not {r.source for r in one_file.train} & {r.source for r in one_file.test}


def test_labels_in_a_column(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "task": "ab"[i % 2]} for i in range(8)]
    path = _write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(read_domains({}, labelled=path)) == ["a", "b"]
    with pytest.raises(DataError, match="label 'b' is not among the domains"):
        read_domains({"a": ""}, labelled=path)
    with pytest.raises(DataError, match='no "topic"'):
        read_domains({}, labelled=path, domain_column="topic")
    with pytest.raises(DataError, match="'c' has no rows"):
        read_domains({"a": "", "b": "", "c": ""}, labelled=path)


def test_empty_domain(tmp_path):
    with pytest.raises(DataError, match="'d' has no rows for training"):
        read_domains({"d": _write(tmp_path, "a.jsonl", "\n")})


def test_only_the_response_is_supervised_and_the_prompt_is_what_a_user_will_send():
    tokenizer = tiny.tokenizer()
    record = to_record(ROWS["messages"], "file:1", "d", None)
    encoded = encode(tokenizer, record)
    learned = [i for i, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s]
    assert tokenizer.decode(learned) == "A<|im_end|>"
    assert encoded.input_ids[: encoded.prompt_length] == encode_prompts(tokenizer, ["Q"])["input_ids"][0].tolist()
    everything = encode(tokenizer, record, loss_on="all")
    assert all(everything.supervised)
    assert everything.prompt_length == encoded.prompt_length


def test_every_assistant_turn_is_supervised_and_the_prompt_ends_at_the_first():
    tokenizer = tiny.tokenizer()
    turns = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    encoded = encode(tokenizer, to_record(row, "file:1", "d", None))
    learned = [i for i, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s]
    assert tokenizer.decode(learned) == "1<|im_end|>2<|im_end|>"
    first = encode_prompts(tokenizer, [[Message("user", "one")]])["input_ids"][0].tolist()
    assert encoded.input_ids[: encoded.prompt_length] == first


def test_a_turn_may_end_with_another_token_than_the_tokenizers_end():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    encoded = encode(tokenizer, to_record(row, "file:1", "d", None))
    learned = [i for i, s in zip(encoded.input_ids, encoded.supervised, strict=True) if s]
    assert tokenizer.decode(learned) == "1</turn><|im_end|>2</turn><|im_end|>"


def test_what_the_template_refuses_is_named(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(DataError, match="file:1: the base's chat template cannot render it: no system turns here"):
        encode_domain(tokenizer, [to_record(ROWS["messages"], "file:1", "d", None)], 0, max_length=99)


def test_tools_as_text_reach_the_record():
    assert to_record({**ROWS["messages"], "tools": '[{"name": "f"}]'}, "f:1", "d", None).tools == ({"name": "f"},)


def test_tokenizer_without_a_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    encoded = encode(tokenizer, to_record(ROWS["messages"], "file:1", "d", None))
    assert tokenizer.decode(encoded.input_ids) == "Q\n\nA<|im_end|>"


def test_truncation_is_counted():
    tokenizer = tiny.tokenizer()
    records = [to_record({"prompt": "p" * n, "completion": "c" * 10}, f"file:{n}", "d", None) for n in (1, 30, 200)]
    fits = len(encode(tokenizer, records[0]).input_ids)
    right, cut = encode_domain(tokenizer, records, 0, max_length=fits + 25, truncation="right")
    assert (cut.shortened, cut.dropped, cut.total) == (1, 1, 3)
    assert [e.length for e in right] == [fits, fits + 25]
    left, cut = encode_domain(tokenizer, records, 0, max_length=fits + 25, truncation="left")
    assert (cut.shortened, cut.dropped) == (2, 0)
    assert all(tokenizer.decode(e.encoded.input_ids).endswith("c" * 10 + "<|im_end|>") for e in left)
    _, cut = encode_domain(tokenizer, records, 0, max_length=fits + 25, truncation="drop")
    assert (cut.shortened, cut.dropped) == (0, 2)
    with pytest.raises(DataError, match="2 problems"):
        encode_domain(tokenizer, records, 0, max_length=fits + 25, truncation="error")


def test_collation_pads_either_side_and_masks_the_rest():
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "longer", "completion": "cc"}]
    examples = encode_domain(tokenizer, [to_record(r, "f:1", "d", None) for r in rows], 1, max_length=99)[0]
    for side in ("right", "left"):
        batch = Collator(tokenizer.pad_token_id, side)(examples)
        assert batch["domain_ids"].tolist() == [1, 1]
        for row, example in enumerate(examples):
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == example.encoded.input_ids
            assert (batch["labels"][row] != IGNORED).sum() == sum(example.encoded.supervised)
            assert batch["prompt_mask"][row].sum() == example.encoded.prompt_length
            width = batch["prompt_mask"].shape[1]
            assert not (batch["prompt_mask"][row] & (batch["labels"][row, :width] != IGNORED)).any()
        assert torch.equal(
            batch["input_ids"][~batch["attention_mask"].bool()].unique(), torch.tensor([tokenizer.pad_token_id])
        )
