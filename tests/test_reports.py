"""Reports: what is read, tables, Markdown, the page's bytes and its safety, the verb.

What a browser shows of the page is in test_report_page.py.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loramix.cli.main import run
from loramix.errors import ConfigError
from loramix.reports.markdown import all_tables, markdown
from loramix.reports.page import page
from loramix.reports.reading import read
from loramix.reports.svg import SERIES
from loramix.reports.tables import NONE, Table
from tests.report_cases import DOMAINS, LONG, UNSEEN, comparison, write_comparison, write_run

ROOT = Path(__file__).parent.parent
# Out of the competition for the best of a column: the bare base, and experts picked by the label.
ASIDE = {"base", "moa/mixture/oracle", "moe-lora/mixture/extracted"}
HOSTILE = {
    LONG: "<script>alert(1)</script>",
    "webgpt": "a|b \"c' &amp; `d` $x^$ [e](javascript:alert(2)) ![f](https://example.com/f.png)",
    "mosld p=0.3, with a long label": "<img src=x onerror=alert(3)> | **p**",
    "x = 1.05 ** years": "</pre></details><script>alert(4)</script>",
    "invented figures": "</title><script>alert(5)</script>\\n| # [x](https://example.com)",
}


@pytest.fixture
def content() -> dict[str, Any]:
    return comparison()


def undrawn(content: dict[str, Any]) -> dict[str, Any]:
    """Takes out what most figures are made of: they take most of the time."""
    for key in ("routing", "classifier", "expert_use", "similarity", "curves"):
        content[key] = {}
    return content


@pytest.fixture(scope="module")
def hostile() -> dict[str, Any]:
    """A comparison whose names, answers and title try to be markup."""
    text = json.dumps(comparison())
    for plain, bad in HOSTILE.items():
        assert plain in text, plain
        text = text.replace(plain, json.dumps(bad)[1:-1].replace("\\\\n", "\\n"))
    return json.loads(text)


@pytest.fixture(scope="module")
def hostile_page(hostile: dict[str, Any]) -> str:
    return page([hostile])


def by_title(content: dict[str, Any], begin: str) -> Table:
    return next(table for table in all_tables(content) if table.title.startswith(begin))


def texts(table: Table) -> dict[str, list[str]]:
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def row_of(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in content["rows"] if row["id"] == name)


def bold(table: Table, column: int) -> list[str]:
    return [row[0].text for row in table.rows if row[column].best]


# Reading


def test_a_comparison_is_read_as_it_is(tmp_path: Path, content: dict[str, Any]):
    assert read(write_comparison(tmp_path, content)) == content
    assert read(str(tmp_path)) == content


def test_a_run_is_read_into_the_same_form(tmp_path: Path, content: dict[str, Any]):
    found = read(write_run(tmp_path / "mine"))
    assert set(found) == set(content)
    assert "mine" in found["title"]
    assert [row["id"] for row in found["rows"]] == [
        "base",
        "lora/single",
        "lora/mixture",
        "moa/mixture/oracle",
        "moa/mixture",
    ]
    for row in found["rows"]:
        assert set(row) == set(content["rows"][0])
    scores = row_of(found, "moa/mixture")["scores"]["perplexity"]
    assert scores["by_domain"]["finance"]["mean"] == 19.5
    assert scores["average"]["mean"] == 20.0
    assert scores["average"]["std"] is None
    assert found["routing"]["moa/mixture"]["decisions"]["last"]["confusion"] == [[19, 1], [1, 19]]
    assert found["routing"]["moa/mixture"]["calibration"]["ece"] == 0.03
    assert list(found["data"]) == ["finance", "金融问答"]
    assert {row: list(curves) for row, curves in found["curves"].items()} == {
        "lora/single": ["finance", "金融问答"],
        "moa/mixture": ["all", "finance"],
    }
    assert found["curves"]["lora/single"]["金融问答"] == [[1, 2.9], [2, 2.8], [3, 2.7]]
    assert found["examples"][0]["answers"] == {"moa/mixture": "A loan"}


def test_the_mixed_model_of_a_run_is_the_method_where_the_method_is_one_lora(tmp_path: Path):
    write_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["rows"] = [row for row in results["rows"] if row["model"] in ("base", "mixed")]
    results["method"] = "prefix"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert [row["id"] for row in read(tmp_path)["rows"]] == ["base", "prefix/mixture"]


def test_a_run_claims_no_interval_and_no_deviation(tmp_path: Path):
    found = read(write_run(tmp_path))
    text = markdown(found)
    assert "±" not in text
    assert "95 %" not in text
    assert "20.000" in text


def test_a_run_without_routers_log_and_counts(tmp_path: Path):
    write_run(tmp_path)
    for name in ("data.json", "environment.json", "log.jsonl"):
        (tmp_path / name).unlink()
    results = json.loads((tmp_path / "results.json").read_text())
    bare = {key: results[key] for key in ("method", "domains", "rows")}
    (tmp_path / "results.json").write_text(json.dumps(bare))
    found = read(tmp_path)
    assert not found["routing"]
    assert not found["curves"]
    assert not found["data"]
    assert page([found]).count("<table") >= 1


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (None, "", "no results here"),
        ("comparison.json", "{", "cannot be read"),
        ("comparison.json", "[1]", "expected an object"),
        ("comparison.json", '{"format": "loramix comparison 99"}', "expected 'loramix comparison 1'"),
        ("comparison.json", '{"format": "loramix comparison 1", "title": "cut short"}', "rows"),
        ("results.json", "\x00\x01", "cannot be read"),
        ("results.json", '{"method": "moa"}', "rows"),
        ("log.jsonl", '{"stage": "expert finance", "st', "log.jsonl"),
    ],
)
def test_what_cannot_be_read_is_told_with_what_to_do(tmp_path: Path, file: str | None, text: str, expected: str):
    if file == "log.jsonl":
        write_run(tmp_path)
    if file is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert re.search(r"again|Expected", str(caught.value)), "nothing says what to do"


def test_an_absent_folder_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="loramix compare"):
        read(tmp_path / "nowhere")


# Tables


@pytest.mark.parametrize(("metric", "title", "wanted"), [("perplexity", "Perplexity", min), ("bleu", "BLEU", max)])
def test_the_best_of_each_column_is_marked(content: dict[str, Any], metric: str, title: str, wanted: Any):
    table = by_title(content, title)
    shown = [row for row in content["rows"] if metric in row["scores"]]
    assert len(shown) == len(table.rows)
    for column, head in enumerate(table.heads[1:], 1):
        domain = head.removesuffix(" (unseen)")
        values: dict[int, float] = {}
        for number, row in enumerate(shown):
            scores = row["scores"][metric]
            value = scores["average"] if head == "mean" else scores["by_domain"].get(domain)
            if value is not None and row["id"] not in ASIDE:
                values[number] = value["mean"]
        best = wanted(values.values())
        expected = [table.rows[number][0].text for number, value in values.items() if value == best]
        assert bold(table, column) == expected, head
        assert len(expected) == 1


def test_ties_are_all_marked_and_nothing_is_best_where_all_are_equal(content: dict[str, Any]):
    rows = [row for row in content["rows"] if "perplexity" in row["scores"]]
    for row in rows:
        scores = row["scores"]["perplexity"]["by_domain"]
        scores["finance"]["mean"] = 2.0 if row["id"] in ("lora/mixture", "mola/mixture") else 3.0
        scores["medicine"]["mean"] = 5.0
    table = by_title(content, "Perplexity")
    assert len(bold(table, 1)) == 2
    assert {name.split(",")[0] for name in bold(table, 1)} == {"lora", "mola"}
    assert bold(table, 2) == []


def test_values_deviations_intervals_and_gaps(content: dict[str, Any]):
    table = by_title(content, "BLEU")
    row = row_of(content, "moa/mixture")["scores"]["bleu"]
    value, mean = row["by_domain"]["finance"], row["average"]
    cells = texts(table)["moa, mixed"]
    assert cells[0] == f"{value['mean']:.1f} ± {value['std']:.1f}"
    assert cells[-1] == f"{mean['mean']:.1f} ± {mean['std']:.1f} [{mean['low']:.1f}, {mean['high']:.1f}]"
    assert "2 seeds" in table.note
    # mola lacks a domain: a gap there, and no mean over the others that would stand beside means over all.
    gaps = texts(table)["mola, mixed"]
    assert gaps[1] == NONE
    assert gaps[-1] == NONE
    assert gaps[0] != NONE


def test_one_seed_has_no_deviation(content: dict[str, Any]):
    table = by_title(comparison(seeds=1), "Perplexity")
    assert "±" not in "".join(cell.text for row in table.rows for cell in row)
    assert "One seed" in table.note


def test_a_mean_over_fewer_domains_is_not_compared(tmp_path: Path, content: dict[str, Any]):
    """comparison.json holds a mean over what was measured, and over how many domains; a cell may have failed."""
    for row in content["rows"]:
        for scores in row["scores"].values():
            scores["domains"] = sum(domain in scores["by_domain"] for domain in content["domains"])
    scores = row_of(content, "mola/mixture")["scores"]["perplexity"]
    del scores["by_domain"][LONG]
    scores["domains"] -= 1
    scores["average"]["mean"] = 0.5
    content = read(write_comparison(tmp_path, content))
    table = by_title(content, "Perplexity")
    assert texts(table)["mola, mixed"][-1] == NONE
    assert not any(name.startswith("mola") for name in bold(table, len(table.heads) - 1))
    assert not re.search(r"mola, mixed has the best", page([undrawn(content)]))


def test_columns_follow_the_domains_that_a_metric_has(content: dict[str, Any]):
    assert by_title(content, "Perplexity").heads == ("", *DOMAINS, *(f"{name} (unseen)" for name in UNSEEN), "mean")
    assert by_title(content, "Accuracy").heads == ("", "exam", "mmlu (unseen)", "mean")


def test_a_failed_row_is_in_no_table_of_scores_but_is_named(content: dict[str, Any]):
    assert not any(name.startswith("prefix") for name in texts(by_title(content, "Perplexity")))
    assert "prefix" in page([undrawn(content)])
    assert "prefix" in markdown(content)


def test_the_layout_of_moa(content: dict[str, Any]):
    table = by_title(content, "As in the MoA paper")
    assert [row[0].text for row in table.rows] == [*DOMAINS, "mean"]
    assert table.heads[:3] == ("domain", "single", "mixed")
    column = next(number for number, head in enumerate(table.heads) if head == "MoA")
    value = row_of(content, "moa/mixture")["scores"]["perplexity"]["by_domain"]["medicine"]
    assert table.rows[1][column].text.startswith(f"{value['mean']:.3f}")
    content["rows"] = [row for row in content["rows"] if row["id"] != "lora/single"]
    content["paired"] = []
    assert not any(table.title.startswith("As in the MoA paper") for table in all_tables(content))


def test_differences_say_against_what_and_count_intervals_without_0(content: dict[str, Any]):
    test = next(one for one in content["paired"] if (one["metric"], one["row"]) == ("bleu", "moa/mixture"))
    for number, domain in enumerate(test["by_domain"].values()):
        sign = (1, 1, 1, -1)[number] if number < 4 else 0
        domain.update(difference=sign * 2.0, low=sign * 2.0 - 1, high=sign * 2.0 + 1, p=0.001)
    test["average"] = {"difference": 1.25, "low": 0.5, "high": 2.0, "p": 0.0004}
    table = by_title(content, "BLEU: difference from lora, mixed")
    assert texts(table)["moa, mixed"] == ["+1.2 [+0.5, +2.0]", "< 0.001", "3 / 1 / 8"]
    assert "lora, mixed" not in texts(table)
    assert texts(table)["mola, mixed"][:2] == [NONE, NONE]


def test_routers_stand_beside_the_classifier(content: dict[str, Any]):
    table = by_title(content, "Who is sent")
    assert "TF-IDF + logistic regression" in table.heads
    assert table.rows[-1][0].text == "all prompts"
    assert "320 held-out prompts (2 seeds together)" in table.note
    found = content["routing"]["moa/mixture"]["decisions"]["last"]["accuracy"]
    assert f"{100 * found:.1f} %" in [cell.text for cell in table.rows[-1]]


def test_rows_of_several_bases_have_names_of_their_own(content: dict[str, Any]):
    second = copy.deepcopy(content["rows"])
    for base, rows in (("small", content["rows"]), ("large", second)):
        for row in rows:
            row["base"], row["id"] = base, f"{base}/{row['id']}"
    content["rows"] += second
    undrawn(content)["paired"] = []
    for table in all_tables(content):
        if table.title.startswith(("Perplexity", "Cost")):
            names = [row[0].text for row in table.rows]
            assert len(names) == len(set(names)), table.title
    assert not repeated(page([content]))


def test_every_table_is_whole(content: dict[str, Any]):
    tables = all_tables(content)
    assert len(tables) >= 10
    for table in tables:
        assert table.title
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.heads)}, table.title


# Markdown


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", re.sub(r"\\\\", "", line)))


def test_markdown_has_as_many_cells_in_each_line(hostile: dict[str, Any]):
    for text in (markdown(hostile), markdown(comparison())):
        blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
        assert len(blocks) == len(all_tables(hostile))
        for block in blocks:
            lines = block.splitlines()
            assert re.fullmatch(r"\|(:?-+:?\|)+", lines[1].replace(" ", ""))
            assert len({columns(line) for line in lines}) == 1, lines[0]
        outside = re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE)
        assert not re.search(r"^\s*\|", outside, flags=re.MULTILINE)


def test_names_are_no_markup_in_markdown(hostile: dict[str, Any]):
    text = markdown(hostile)
    assert r"\<script\>alert(1)" in text
    assert not re.search(r"(?<!\\)<", text), "an element"
    assert not re.search(r"(?<!\\)\]\(", text), "a link"
    assert text.count("\n# ") + text.startswith("# ") == 1, "a heading of its own"


# The page


class Elements(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def repeated(text: str) -> list[str]:
    """Ids that stand in a page more than once."""
    counts = Counter(str(attributes["id"]) for _, attributes in Elements(text).found if "id" in attributes)
    assert counts
    return [name for name, count in counts.items() if count > 1]


def test_names_and_answers_are_no_markup_in_the_page(hostile_page: str):
    text = hostile_page
    elements = Elements(text).found
    assert not [tag for tag, _ in elements if tag in ("script", "img", "iframe", "object", "embed", "form", "base")]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    links = [str(attributes["href"]) for tag, attributes in elements if tag == "a"]
    assert all(link.startswith("#") for link in links)
    for number in range(1, 6):
        assert f"alert({number})" in text, "the hostile text is not there at all"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_nothing_in_the_page_is_loaded_from_elsewhere(hostile_page: str):
    text = hostile_page
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)
    for _, attributes in Elements(text).found:
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (name, value)
    for style in re.findall(r"<style.*?</style>|style=\"[^\"]*\"", text, flags=re.DOTALL):
        assert "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", style))


@pytest.mark.parametrize("count", [1, 3])
def test_ids_are_unique_and_every_link_has_its_target(count: int, tmp_path: Path):
    contents = [comparison(domains=4, seeds=1), read(write_run(tmp_path)), undrawn(comparison())]
    text = page(contents[:count])
    assert not repeated(text)
    elements = Elements(text).found
    ids = {attributes.get("id") for _, attributes in elements}
    targets = [
        str(a[name])[1:] for _, a in elements for name in ("href", "xlink:href") if (a.get(name) or "")[:1] == "#"
    ]
    targets += re.findall(r"url\(#([^)]+)\)", text)
    assert len(targets) > 20
    assert set(targets) <= ids


def test_labels_of_another_script_have_ids_of_their_own(content: dict[str, Any]):
    first = content["similarity"]["mosld/mixture"]
    undrawn(content)["similarity"] = {"甲/mixture": first, "乙/mixture": first}
    assert not repeated(page([content]))


def test_a_page_of_almost_nothing(content: dict[str, Any]):
    """A comparison of which only the base is measured yet, without routing."""
    for row in content["rows"]:
        if row["id"] != "base":
            row["scores"], row["seeds"] = {}, []
            row["cost"] = {**dict.fromkeys(row["cost"], 0), "peak_memory_mb": None}
    for key in ("overlap", "paired", "examples"):
        content[key] = []
    text = page([undrawn(content)])
    assert text.count("<table") >= 3
    assert markdown(content).count("\n## ") >= 3
    content["rows"] = []
    content["metrics"] = {}
    assert "<h1>" in page([content])


def test_expert_use_of_many_modules_stays_small(content: dict[str, Any]):
    """A router in each of 7 modules of 30 layers: 210 rows in a figure would be no figure."""
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [f"{layer}.self_attn.{name}" for layer in range(30) for name in projections]
    shares = [[0.5 + layer / 100, 0.5 - layer / 100] for layer in range(30) for _ in projections]
    one = {"layers": layers, "experts": ["0", "1"], "by_domain": dict.fromkeys(DOMAINS, shares)}
    undrawn(content)["expert_use"] = {"mola/mixture": one}
    text = page([content])
    begin = text.index("Which experts work")
    figure = text[begin : text.index("</figure>", begin)]
    _, _, width, height = (float(part) for part in re.search(r'viewBox="([^"]+)"', figure).group(1).split())
    assert height < 1.2 * width
    assert "self_attn" not in figure
    assert "means over its modules" in figure
    ticks = re.findall(r"<text[^>]*>(\d+)</text>", figure)
    assert "25" in ticks, "layers are named by their numbers"
    assert re.findall(r"<td>(\d+ %)</td>", figure)[:2] == ["64 %", "36 %"]


def test_the_judge_is_shown(content: dict[str, Any]):
    verdicts = {"first": 3, "second": 1, "tie": 0, "unread": 0, "disagreed": 1}
    content["judge"] = {
        "signature": "judge|some-model|0-100",
        "scores": {"moa/mixture": {"finance": {"mean": 71.25, "unread": 1, "stats": [[0.7, 1], [0, 0]]}}},
        "against": "lora/mixture",
        "pairs": {"moa/mixture": {"finance": verdicts}},
        "cost": {"requests": 3, "input_tokens": 900, "output_tokens": 30, "money": 0.01},
    }
    for text in (page([undrawn(content)]), markdown(content)):
        assert "71.2" in text
        assert "some-model" in text


def test_colours_of_lines_stand_out_on_the_light_page_and_on_the_dark():
    papers = re.findall(r"--paper: (#[0-9a-f]{6});", page([undrawn(comparison(domains=4))]))
    assert len(papers) == 2

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in SERIES:
        for paper in papers:
            low, high = sorted((luminance(colour), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, paper)


TWICE = """
import hashlib, json, sys
from loramix.reports.markdown import all_tables, markdown
from loramix.reports.page import page
contents = [json.load(open(path, encoding="utf-8")) for path in sys.argv[1:]]
print(hashlib.sha256((page(contents) + markdown(contents[0])).encode()).hexdigest())
"""


def test_the_same_content_gives_the_same_bytes_in_another_process(tmp_path: Path):
    files = []
    for number in range(2):
        content = comparison(domains=6) if number == 0 else undrawn(comparison())
        folder = write_comparison(tmp_path / str(number), content)
        files.append(str(folder / "comparison.json"))
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", TWICE, *files], env=environment, capture_output=True, text=True, cwd=ROOT, check=True
        )
        found.add(done.stdout)
        assert done.stderr == "", "names that the drawing font lacks are nobody's concern"
    assert len(found) == 1
    assert len(found.pop().strip()) == 64


# The verb


def test_the_verb_writes_page_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, second = write_comparison(tmp_path / "a", undrawn(comparison())), write_run(tmp_path / "b")
    assert run(["report", str(first)]) == 0
    assert (first / "report.html").read_text(encoding="utf-8") == page([read(first)])
    assert (first / "tables.md").read_text(encoding="utf-8") == markdown(read(first))
    told = capsys.readouterr().out
    assert str(first / "report.html") in told
    assert str(first / "tables.md") in told
    assert run(["report", str(first), str(second), "--out", str(tmp_path / "new" / "both.html")]) == 0
    assert (tmp_path / "new" / "both.html").read_text(encoding="utf-8") == page([read(first), read(second)])
    both = (tmp_path / "new" / "tables.md").read_text(encoding="utf-8")
    assert markdown(read(first)) in both
    assert markdown(read(second)) in both


def test_the_verb_prints_json_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_comparison(tmp_path)
    assert run(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == comparison()
    assert [file.name for file in folder.iterdir()] == ["comparison.json"]
    assert run(["report", str(folder), str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_the_verb_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["report", str(tmp_path / "nowhere")]) == 2
    assert "no results here" in capsys.readouterr().err
    assert run(["report", str(write_run(tmp_path / "a")), "--out", str(tmp_path / "a")]) == 2
    assert str(tmp_path / "a") in capsys.readouterr().err
    assert run(["report"]) == 2


def test_help_draws_nothing():
    code = (
        "import sys\n"
        "from loramix.cli.main import run\n"
        "code = run(['report', '--help'])\n"
        "heavy = {'matplotlib', 'torch', 'numpy', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy or code else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--markdown" in done.stdout
