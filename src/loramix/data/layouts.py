"""Rows of well-known public data sets, turned into the simple forms of formats.py.

Each layout is recognised by its keys alone. One row may give several (a RACE passage has several questions).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from typing import Any

Row = Mapping[str, Any]
_ADAPTERS = re.compile(
    r"(?s)^(?:Please choose the correct answer to the question: )?(.*?)\n\nAnswer1: (.*?)\n\nAnswer "
)
_MEDICAL = {"question", "question_text", "answer"}


def rows_of(row: Any) -> list[Any]:
    """Returns the row as it is, or as one or more rows of a simple form if it has the layout of a known data set."""
    if not isinstance(row, Mapping):
        return [row]
    for keys, read in _LAYOUTS:
        if keys <= row.keys():
            found = read(row)
            if found is not None:
                return found
    return [row]


def _race(row: Row) -> list[Any] | None:
    """RACE as its authors store it: a passage with questions, options and letters side by side."""
    parts = [row[key] for key in ("questions", "options", "answers")]
    if not all(isinstance(part, list) for part in parts) or len({len(part) for part in parts}) != 1:
        return None
    return [
        {"context": row["article"], "question": question, "choices": options, "answer": answer}
        for question, options, answer in zip(*parts, strict=True)
    ]


def _llm_adapters(row: Row) -> list[Any] | None:
    """LLM-Adapters' commonsense sets: options inside the instruction ("Answer1: ..."), answer "answer2"."""
    said = re.fullmatch(r"answer(\d)", str(row["answer"]))
    found = _ADAPTERS.match(str(row["instruction"]))
    if said is None or found is None:
        return None
    options = re.split(r"\s*Answer\d: ", found.group(2))
    return [{"question": found.group(1), "choices": options, "answer": int(said.group(1)) - 1}]


def _openbookqa(row: Row) -> list[Any]:
    """OpenBookQA as the Hub has it: the question is called question_stem; the fact it rests on is left out."""
    return [{"question": row["question_stem"], "choices": row["choices"], "answer": row["answerKey"]}]


def _mctest_hub(row: Row) -> list[Any] | None:
    """MCTest as the Hub has it: options by letter."""
    options = row["answer_options"]
    if not isinstance(options, Mapping):
        return None
    return [
        {
            "context": row["story"],
            "question": row["question"],
            "choices": list(options.values()),
            "answer": row["answer"],
        }
    ]


def _webgpt(row: Row) -> list[Any] | None:
    """WebGPT's comparisons: the answer people preferred is learned."""
    question = row["question"]
    asked = question.get("full_text") if isinstance(question, Mapping) else question
    better = "answer_0" if float(row["score_0"]) >= float(row["score_1"]) else "answer_1"
    return [{"prompt": asked, "completion": row[better]}]


def _conala(row: Row) -> list[Any]:
    """CoNaLa: a Stack Overflow title, better worded where somebody did, and a line of Python."""
    return [{"prompt": row["rewritten_intent"] or row["intent"], "completion": row["snippet"]}]


def _medical(row: Row) -> list[Any] | None:
    """Questions of patients with a title and, mostly, a full text."""
    asked = " ".join(str(row["question_text"] or "").split()) or row["question"]
    return [{"prompt": asked, "completion": row["answer"]}]


def _gorilla(row: Row) -> list[Any] | None:
    """APIBench: an instruction inside `code`, a Python dict or marked lines, and the call that serves it."""
    found = re.search(
        r"(?s)Instruction'?\"?: ?['\"]?(.*?)['\"]?,? *(?:\n|'Output'|\"Output\"|###Output)", str(row["code"])
    )
    return None if found is None else [{"prompt": found.group(1).strip(), "completion": row["api_call"]}]


def _leetcode(row: Row) -> list[Any]:
    """Doocs LeetCode: an English statement in HTML and a solution in Python."""
    asked = f"{row['title_en']}\n\n{plain_text(row['description_en'])}\n\nWrite a solution in Python."
    return [{"prompt": asked, "completion": row["solution_py"]}]


def _gaokao(row: Row) -> list[Any] | None:
    """GAOKAO-Bench: a question with options in its text, letters (or an answer in words), and the worked analysis."""
    if not isinstance(row["answer"], list) or not isinstance(row["question"], str):
        return None  # questions to be answered in words are questions with an answer, like all others
    reply = f"【答案】{' '.join(map(str, row['answer']))}\n【解析】{str(row['analysis']).strip()}"
    return [{"prompt": row["question"].strip(), "completion": reply}]


def _preferred(row: Row) -> list[Any] | None:
    """OpenAI's preference form: the preferred answer is learned."""
    if not isinstance(row["input"], Mapping) or "messages" not in row["input"]:
        return None
    turns = [*row["input"]["messages"], *row["preferred_output"]]
    return [{"messages": [{"role": turn.get("role"), "content": turn.get("content")} for turn in turns]}]


def _with_context(row: Row) -> list[Any] | None:
    """A question with a text it is about; the text must not be lost."""
    if not isinstance(row["context"], str) or "choices" in row or "options" in row or "choice0" in row or "A" in row:
        return None
    context = row["context"].strip()
    question = row["question"]
    asked = f"{context}\n\n{question}" if context and isinstance(question, str) else question
    return [
        {**{key: row[key] for key in ("system", "tools") if key in row}, "prompt": asked, "completion": row["answer"]}
    ]


_LAYOUTS: tuple[tuple[set[str], Callable[[Row], list[Any] | None]], ...] = (
    ({"article", "questions", "options", "answers"}, _race),
    ({"instruction", "answer"}, _llm_adapters),
    ({"question_stem", "choices", "answerKey"}, _openbookqa),
    ({"story", "question", "answer_options", "answer"}, _mctest_hub),
    ({"question", "answer_0", "answer_1", "score_0", "score_1"}, _webgpt),
    ({"intent", "rewritten_intent", "snippet"}, _conala),
    (_MEDICAL, _medical),
    ({"code", "api_call", "provider"}, _gorilla),
    ({"title_en", "description_en", "solution_py"}, _leetcode),
    ({"question", "answer", "analysis"}, _gaokao),
    ({"input", "preferred_output"}, _preferred),
    ({"context", "question", "answer"}, _with_context),
)


class _Text(HTMLParser):
    """Collects the text of HTML; blocks begin new lines, and only in <pre> do blanks and line breaks count."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.verbatim = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "pre", "ul", "ol", "li", "br", "div", "table", "tr"):
            self.parts.append("\n- " if tag == "li" else "\n")
            self.verbatim |= tag == "pre"
        elif tag == "sup":
            self.parts.append("^")

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.verbatim = False
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        text = data if self.verbatim else re.sub(r"\s+", " ", data)
        if not self.verbatim and (not self.parts or self.parts[-1].endswith((" ", "\n"))):
            text = text.lstrip()
        if text:
            self.parts.append(text)


def plain_text(html: str) -> str:
    """Returns the text of an HTML fragment, one line a block, no empty ones, powers as ^."""
    reader = _Text()
    reader.feed(html)
    reader.close()  # hands over what follows the last tag
    lines = "".join(reader.parts).replace("\xa0", " ").split("\n")
    return "\n".join(line.rstrip() for line in lines if line.strip())
