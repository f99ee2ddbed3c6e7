"""The page in a real browser: silent, self-contained, no wider than its screen, readable without seeing its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramix.reports.page import page
from loramix.reports.reading import read
from tests.chromium import Chromium, program
from tests.report_cases import LONG, comparison, write_run

EXECUTABLE = program()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="needs Chromium or Chrome: on the PATH (apt-get install chromium), or named by CHROME"
)
OVERFLOWING = """
[...document.querySelectorAll("body *")].filter(e => {
  if (e.closest(".box, .drawing")) return false;   // these scroll by themselves
  return e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map(e => e.outerHTML.slice(0, 80))
"""
# The worst contrast, as WCAG 2.2 counts it, of a text's colour to the colour behind it.
CONTRASTS = """
(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  const told = [];
  for (const e of document.querySelectorAll("p, li, h1, h2, h3, th, td, dt, dd, a, summary, figcaption, footer, pre")) {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    told.push([(a + 0.05) / (b + 0.05), e.tagName, getComputedStyle(e).color, behind(e)]);
  }
  return told.sort((x, y) => x[0] - y[0])[0];
})()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison, with names that try to run, and a run, in one page."""
    folder = tmp_path_factory.mktemp("page")
    hostile = "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>"
    content = json.loads(json.dumps(comparison()).replace(LONG, hostile))
    path = folder / "report.html"
    path.write_text(page([content, read(write_run(folder / "run"))]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium(str(EXECUTABLE)) as chromium:
        yield chromium


def test_the_browser_tells_what_a_page_does(browser: Chromium, tmp_path: Path):
    """So that silence in the tests below means something."""
    loud = tmp_path / "loud.html"
    loud.write_text(
        "<!doctype html><script>console.log('said')</script><img src='https://example.invalid/x.png'>"
        "<div style='width: 900px'>wide</div>"
    )
    browser.open(loud, 360)
    assert any("said" in text for text in browser.console)
    assert "https://example.invalid/x.png" in browser.requests
    assert browser.value("document.documentElement.scrollWidth") >= 900


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_silent_and_asks_for_nothing(browser: Chromium, file: Path, width: int, dark: bool):
    browser.open(file, width, dark)
    assert browser.console == []
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [file.resolve().as_uri()]
    assert "broken" not in browser.value("document.title")
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("width", [1280, 768, 360, 320])
def test_the_page_is_no_wider_than_its_screen(browser: Chromium, file: Path, width: int):
    browser.open(file, width)
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.value("document.documentElement.clientWidth") == width
    assert browser.value(OVERFLOWING) == []
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_every_figure_is_told_in_words_and_numbers(browser: Chromium, file: Path):
    browser.open(file, 1280)
    count = browser.value("document.querySelectorAll('svg').length")
    assert count >= 12
    drawn = "[...document.querySelectorAll('svg')]"
    assert browser.value(f"{drawn}.filter(e => !e.closest('[role=img]')).length") == 0
    assert browser.value(f"{drawn}.filter(e => (e.closest('[role=img]').ariaLabel || '').length < 20).length") == 0
    assert browser.value(f"{drawn}.filter(e => !e.closest('figure').querySelector('table tbody tr td')).length") == 0
    assert browser.value(f"{drawn}.filter(e => !e.closest('figure').querySelector('figcaption')).length") == 0
    # Drawn, not empty: every figure has some text and takes some room.
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.value(f"{drawn}.filter(e => e.querySelectorAll('text').length < 2).length") == 0
    assert browser.value(f"{drawn}.filter(e => e.getBoundingClientRect().height < 60).length") == 0


def test_text_of_figures_is_not_cut(browser: Chromium, file: Path):
    """Measured with the browser's own font, which is not the one the figure was laid out with."""
    browser.open(file, 1280)
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    cut = browser.value(
        """[...document.querySelectorAll("svg")].flatMap(s => { const a = s.getBoundingClientRect();
          return [...s.querySelectorAll("text")].filter(t => { const b = t.getBoundingClientRect();
            return b.left < a.left - 4 || b.right > a.right + 4 || b.top < a.top - 4 || b.bottom > a.bottom + 4;
          }).map(t => s.closest("figure").id + ": " + t.textContent); })"""
    )
    assert cut == []


def test_every_table_has_heads(browser: Chromium, file: Path):
    browser.open(file, 1280)
    tables = "[...document.querySelectorAll('table')]"
    assert browser.value(f"{tables}.length") >= 20
    assert browser.value(f"{tables}.filter(e => !e.querySelector('thead th[scope=col]')).length") == 0
    assert browser.value(f"{tables}.filter(e => !e.querySelector('tbody tr')).length") == 0
    rows = "[...document.querySelectorAll('tbody tr')]"
    assert browser.value(f"{rows}.filter(e => !e.querySelector('th[scope=row]')).length") == 0
    ragged = f"{rows}.filter(e => e.children.length !== e.closest('table').tHead.rows[0].children.length).length"
    assert browser.value(ragged) == 0


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser: Chromium, file: Path, dark: bool):
    browser.open(file, 1280, dark)
    assert browser.value("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'") is dark
    worst = browser.value(CONTRASTS)
    assert worst[0] >= 4.5, worst


def test_the_page_prints(browser: Chromium, file: Path, tmp_path: Path):
    browser.open(file, 1280)
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    assert (tmp_path / "page.pdf").stat().st_size > 20_000
