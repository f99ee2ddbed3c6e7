"""The chat page in a real browser, under the server's policy, against a stand-in for the server."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import Chromium, program
from tests.fake_chat_server import MARKUP, PAGE, POLICY, FakeChatServer

EXECUTABLE = program()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="needs Chromium or Chrome: on the PATH (apt-get install chromium), or named by CHROME"
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32, "ArrowDown": 40}
SHIFT = 8
READY = "document.readyState === 'complete' && document.getElementById('first')?.disabled === false"
IDLE = "document.getElementById('stop').hidden"
ASKING = "document.getElementById('key-dialog')?.open === true"
ANSWERS = "[...document.querySelectorAll('.answer')].map(e => e.querySelector('.words').textContent)"
WHO = "[...document.querySelectorAll('.who')].map(e => e.textContent)"
TOLD = "document.getElementById('told').textContent"
TROUBLE = "document.querySelector('#log .trouble p').textContent"
# Every text's contrast to what is behind it, as WCAG 2.2 counts it; the worst.
WORST_CONTRAST = """
(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
  const shown = e => e.getClientRects().length && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll("body *")].filter(shown).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
  }).sort((x, y) => x[0] - y[0])[0];
})()
"""


class Page:
    """The chat page in a tab, used as a reader uses it."""

    def __init__(self, browser: Chromium, server: FakeChatServer) -> None:
        self.browser, self.server = browser, server

    def open(self, width: int = 1200, dark: bool = False, ready: str = READY) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
        self.browser.call("Emulation.setDeviceMetricsOverride", **size)
        self.browser.call("Emulation.setEmulatedMedia", features=[scheme])
        self.browser.console.clear()
        self.browser.requests.clear()
        self.browser.call("Page.navigate", url=self.server.url)
        self.wait(f"location.href === '{self.server.url}' && ({ready})")

    def value(self, expression: str) -> Any:
        return self.browser.value(expression)

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 20
        while not self.value(condition):
            assert time.monotonic() < end, f"{condition}\n{self.value('document.body.innerText')}"
            time.sleep(0.01)

    def press(self, key: str, modifiers: int = 0) -> None:
        about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {"type": "rawKeyDown"} if text is None else {"type": "keyDown", "text": text}
        self.browser.call("Input.dispatchKeyEvent", **about, **more)
        self.browser.call("Input.dispatchKeyEvent", **about, type="keyUp")

    def type(self, text: str) -> None:
        self.browser.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({selector!r}).click()")

    def send(self, text: str) -> None:
        """Types a message where the focus is, which is the message field, and presses Enter."""
        self.type(text)
        self.press("Enter")

    def ask(self, text: str) -> None:
        """Sends a message and waits for the end of its answers."""
        count = self.value("document.querySelectorAll('.turn').length")
        self.send(text)
        self.wait(f"document.querySelectorAll('.turn').length > {count} && {IDLE}")

    def choose(self, select: str, model: str) -> None:
        self.value(f"document.getElementById('{select}').value = '{model}'")

    def focused(self) -> str:
        return self.value("document.activeElement.id || document.activeElement.textContent.trim()")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium(str(EXECUTABLE)) as chromium:
        yield chromium


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with FakeChatServer() as fake:
        yield fake


@pytest.fixture
def page(browser: Chromium, server: FakeChatServer) -> Page:
    return Page(browser, server)


def test_an_answer_streams_and_says_who_gave_it(page: Page, server: FakeChatServer):
    page.open()
    page.send("slow: what is a bond?")
    page.wait(f"{ANSWERS}[0] === 'An answer by the mixture'")
    # The first half stands; a screen reader is told of the whole answer only.
    assert page.value(WHO) == ["finance 93 %"]
    assert page.value("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    assert page.value("document.querySelector('.answer').closest('[aria-live]').getAttribute('aria-live')") == "off"
    assert "An answer" not in page.value(TOLD)
    server.go.set()
    page.wait(IDLE)
    assert page.value(ANSWERS) == ["An answer by the mixture to: slow: what is a bond?"]
    assert page.value(TOLD).endswith("Answer by finance, 93 %: An answer by the mixture to: slow: what is a bond?")
    assert page.value("document.querySelector('.answer').hasAttribute('aria-busy')") is False
    speed = page.value("document.querySelector('.end').textContent")
    assert speed.startswith("first token after 0.")
    assert "· 4 tokens ·" in speed
    assert speed.endswith(" tokens/s")
    # What was sent, and from where; nothing else was asked for, and nobody complained.
    body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 256, "temperature": 0}
    messages = [{"role": "user", "content": "slow: what is a bond?"}]
    assert server.bodies == [{"model": "demo", "messages": messages, **body}]
    assert all(address.startswith((server.url, "data:")) for address in page.browser.requests)
    assert page.browser.console == []


def test_the_probabilities_are_listed_in_order(page: Page):
    page.open()
    page.ask("what is a bond?")
    page.click(".answer summary")
    rows = "[...document.querySelectorAll('.probabilities li')].map(e => e.textContent)"
    assert page.value(rows) == ["finance93 %", "maths4 %", "medicine3 %"]
    widths = "[...document.querySelectorAll('.probabilities .share')].map(e => e.getBoundingClientRect().width)"
    first, second, _ = page.value(widths)
    assert first > 10 * second > 0
    assert page.value("document.querySelectorAll('[style]').length") == 0


def test_the_base_and_mixed_experts_are_named(page: Page):
    page.open()
    page.ask("unlike anything")
    page.ask("mixed")
    assert page.value(WHO) == ["base answered: unlike all domains", "All experts mixed token by token"]
    assert "Distance from all domains: 3.21. Above 2.80 the base answers." in page.value("document.body.textContent")


def test_experts_without_names_are_not_promised(page: Page, server: FakeChatServer):
    server.experts = ()
    page.open()
    options = "[...document.getElementById('first').options].map(e => e.text)"
    assert page.value(options) == ["all experts together", "base"]
    assert "mixed token by token" in page.value("document.getElementById('lead').textContent")


def test_a_pin_and_the_settings_are_sent(page: Page, server: FakeChatServer):
    page.open()
    assert page.value("[...document.getElementById('first').options].map(e => e.text)") == [
        "the expert that fits", "finance", "maths", "medicine", "base"
    ]  # fmt: skip
    page.choose("first", "demo:maths")
    page.value("document.getElementById('tokens').value = 7; document.getElementById('temperature').value = 0.5")
    page.ask("one and one, cut")
    page.choose("first", "demo:base")
    page.ask("and two")
    assert [body["model"] for body in server.bodies] == ["demo:maths", "demo:base"]
    assert (server.bodies[0]["max_tokens"], server.bodies[0]["temperature"]) == (7, 0.5)
    assert page.value(WHO) == ["maths chosen by you", "base chosen by you"]
    assert page.value("document.querySelector('.end').textContent").startswith("cut at the longest answer allowed · ")
    # The conversation goes along.
    said = [(message["role"], message["content"]) for message in server.bodies[1]["messages"]]
    answer = "An answer by maths to: one and one, cut"
    assert said == [("user", "one and one, cut"), ("assistant", answer), ("user", "and two")]
    # A setting that cannot be is pointed at, not sent.
    page.value("document.getElementById('temperature').value = 3")
    page.send("never sent")
    assert page.value("document.getElementById('settings').open")
    assert page.focused() == "temperature"
    assert len(server.bodies) == 2


def test_two_answer_side_by_side(page: Page, server: FakeChatServer):
    page.open()
    page.ask("before")
    page.click("#compare")
    page.ask("what is a bond?")
    page.ask("and a share?")
    assert page.value(f"{ANSWERS}.slice(1, 3)") == [
        "An answer by the mixture to: what is a bond?", "An answer by base to: what is a bond?"
    ]  # fmt: skip
    assert page.value(f"{WHO}.slice(1, 3)") == ["finance 93 %", "base chosen by you"]
    # Each goes on from its own answers; where it gave none, from the other's.
    sent = {body["model"]: [m["content"] for m in body["messages"]] for body in server.bodies[-2:]}
    before = ["before", "An answer by the mixture to: before", "what is a bond?"]
    assert sent["demo"] == [*before, "An answer by the mixture to: what is a bond?", "and a share?"]
    assert sent["demo:base"] == [*before, "An answer by base to: what is a bond?", "and a share?"]
    boxes = "[...document.querySelectorAll('.answer')].slice(1, 3).map(e => e.getBoundingClientRect().{})"
    left, right = page.value(boxes.format("left"))
    assert right > left + 300
    size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.browser.call("Emulation.setDeviceMetricsOverride", **size)
    left, right = page.value(boxes.format("left"))
    top, bottom = page.value(boxes.format("top"))
    assert left == right
    assert top < bottom


@pytest.mark.parametrize("by_key", [True, False])
def test_stopping_ends_the_request_and_keeps_what_came(page: Page, server: FakeChatServer, by_key: bool):
    page.open()
    page.click("#compare")
    page.value("document.getElementById('message').focus()")
    page.send("slow")
    page.wait(f"{ANSWERS}.every(text => text.startsWith('An answer by'))")
    if by_key:
        page.press("Escape")
    else:
        page.value("document.getElementById('stop').focus()")
        page.click("#stop")
    page.wait(IDLE)
    assert server.left.wait(10)
    assert page.value(ANSWERS) == ["An answer by the mixture", "An answer by base"]
    assert "Stopped." in page.value(TOLD)
    assert page.focused() == "message"
    assert page.value("document.querySelector('.end').textContent").startswith("stopped · ")
    assert page.browser.console == []


def test_the_key_is_asked_for_and_kept_for_the_tab_only(page: Page, server: FakeChatServer):
    server.key = "the-right-key"
    page.open(ready=ASKING)
    assert page.focused() == "key"
    page.send("a-wrong-key")
    page.wait("!document.getElementById('key-problem').hidden")
    assert page.value(ASKING)
    page.send(server.key)
    page.wait(READY)
    page.value("document.getElementById('message').focus()")
    page.ask("what is a bond?")
    assert page.value(WHO) == ["finance 93 %"]
    page.open()  # a reload does not ask again
    assert not page.value(ASKING)
    assert page.value("Object.values(sessionStorage)") == [server.key]
    assert page.value("Object.values(localStorage).length + document.cookie.length") == 0
    assert not any(server.key in path for path in server.paths)
    # A key that is taken back is asked for again, once for two answers, which then come.
    server.key = "another-key"
    page.click("#compare")
    page.value("document.getElementById('message').focus()")
    page.send("after")
    page.wait(ASKING)
    page.send(server.key)
    page.wait(f"{IDLE} && {ANSWERS}.length === 2 && {ANSWERS}.every(text => text.endsWith('after'))")
    assert not page.value(ASKING)


def test_without_a_key_the_page_says_so(page: Page, server: FakeChatServer):
    server.key = "some-key"
    page.open(ready=ASKING)
    page.press("Escape")
    page.wait("!document.getElementById('trouble').hidden")
    assert page.value("document.getElementById('trouble-text').textContent").startswith("This server needs a key")
    page.click("#reload")
    page.wait(ASKING)
    page.send("some-key")
    page.wait(f"{READY} && document.getElementById('trouble').hidden")


def test_errors_are_told_in_plain_words_and_can_be_tried_again(page: Page, server: FakeChatServer):
    page.open()
    page.ask("busy")
    assert page.value(TROUBLE) == "The server is busy. Try again in 7 seconds."
    assert page.value(TOLD).endswith("Try again in 7 seconds.")
    server.refusal = lambda question: None  # type: ignore[method-assign]
    page.click("#log .trouble button")
    page.wait(f"{IDLE} && {ANSWERS}[0] === 'An answer by the mixture to: busy'")
    assert page.focused() == "message"
    assert page.value("document.querySelectorAll('#log .trouble').length") == 0
    assert [body["messages"] for body in server.bodies] == 2 * [[{"role": "user", "content": "busy"}]]


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("forbidden", "The server refused this. max_tokens = 9999: this server writes 1024 at most."),
        ("mistake", "The server failed. Its log says more."),
        ("broken", "The answer broke off. The engine stopped."),
    ],
)
def test_other_errors(page: Page, server: FakeChatServer, question: str, told: str):
    page.open()
    page.ask(question)
    assert page.value(TROUBLE) == told
    # Going on leaves out what has no answer, and then it cannot be tried again.
    page.ask("next")
    kept = ["broken", "An answer by the mixture", "next"] if question == "broken" else ["next"]
    assert [message["content"] for message in server.bodies[-1]["messages"]] == kept
    assert page.value("document.querySelectorAll('#log .trouble button').length") == 0


def test_a_page_opened_with_a_login_in_its_address(page: Page, server: FakeChatServer):
    """Browsers leave the login out of what a page sees, and refuse requests that would carry it along."""
    page.browser.call("Page.navigate", url=server.url.replace("://", "://name:word@"))
    page.wait(f"location.href === '{server.url}' && {READY}")
    page.ask("what is a bond?")
    assert page.value(WHO) == ["finance 93 %"]


def test_a_server_that_is_gone_is_said_to_be(page: Page, server: FakeChatServer):
    page.open()
    server.__exit__()
    page.ask("anyone?")
    assert page.value(TROUBLE) == "The server cannot be reached. See whether it still runs."


def test_what_a_model_writes_stays_text(page: Page):
    page.open()
    page.ask("markup <b>mine</b>")
    assert page.value(ANSWERS) == [MARKUP]
    assert page.value("document.querySelector('.question .words').textContent") == "markup <b>mine</b>"
    assert page.value("document.querySelectorAll('#log :is(img, script, b)').length") == 0
    assert page.value("document.title") == "Chat · loramix"
    assert page.browser.console == []


def test_the_keyboard_alone_is_enough(page: Page, server: FakeChatServer):
    page.open()
    assert page.focused() == "message"
    page.type("one")
    page.press("Enter", SHIFT)
    page.type("two")
    assert server.bodies == []
    page.ask("")
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo"
    page.ask("again")
    page.value("window.getSelection().removeAllRanges(); document.activeElement.blur()")
    page.value("document.getElementById('new').focus()")
    order = []
    for _ in range(8):
        order.append(page.focused())
        ringed = page.value("getComputedStyle(document.activeElement).outlineStyle")
        assert ringed != "none" or order[-1] == "new", order  # focused by a script above: no ring is due
        page.press("Tab")
    probabilities = ["All probabilities", "All probabilities"]
    assert order == ["new", *probabilities, "first", "compare", "Settings", "message", "send"]
    # A new conversation, too.
    page.value("document.getElementById('new').focus()")
    page.press("Enter")
    page.wait("document.getElementById('log').childElementCount === 0")
    assert page.focused() == "message"
    page.ask("fresh")
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["fresh"]


def test_a_word_in_composition_is_not_sent(page: Page, server: FakeChatServer):
    page.open()
    page.type("ni")
    event = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.value(f"document.getElementById('message').dispatchEvent({event})")
    assert page.value("document.querySelectorAll('.turn').length") == 0
    assert server.bodies == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_control_has_a_name_and_every_text_contrast(page: Page, dark: bool):
    page.open(dark=dark)
    page.click("#compare")
    page.value("document.getElementById('message').focus()")
    page.ask("unlike anything")
    page.ask("busy")
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    page.value("document.getElementById('another-key').hidden = false")
    worst, where = page.value(WORST_CONTRAST)
    assert worst >= 4.5, where
    page.browser.call("Accessibility.enable")
    for opened in ("page", "dialog"):
        if opened == "dialog":
            page.click("#another-key")
            worst, where = page.value(WORST_CONTRAST)
            assert worst >= 4.5, where
        nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
        named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if not n["ignored"] and "name" in n]
        roles = {"button", "combobox", "checkbox", "spinbutton", "textbox", "DisclosureTriangle", "dialog", "log"}
        found = [one for one in named if one[0] in roles]
        assert all(name for _, name in found), found
        expected = {"dialog": [("dialog", "A key is needed"), ("textbox", "Key"), ("button", "Use this key")]}
        expected["page"] = [("log", "Conversation"), ("textbox", "Message"), ("combobox", "Answer by")]
        expected["page"] += [("spinbutton", "Longest answer in tokens (max_tokens)"), ("checkbox", "Compare two")]
        assert set(expected[opened]) <= set(found)
    page.browser.call("Accessibility.disable")


@pytest.mark.parametrize("width", [360, 320])
def test_the_page_is_no_wider_than_its_screen(page: Page, width: int):
    page.open(width)
    page.click("#compare")
    page.value("document.getElementById('message').focus()")
    page.ask("unlike " + "x" * 300)
    page.ask("busy")
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.value("document.documentElement.clientWidth") == width
    assert page.value("document.documentElement.scrollWidth") <= width
    over = f"[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > {width + 1})"
    assert page.value(f"{over}.map(e => e.outerHTML.slice(0, 80))") == []


def test_a_long_answer_is_followed_unless_the_reader_scrolls_away(page: Page):
    gap = "document.documentElement.scrollHeight - innerHeight - Math.round(scrollY)"
    page.open()
    page.ask("long")
    assert page.value(gap) < 40
    page.send("slow and long")
    page.wait(f"{ANSWERS}[1]?.includes('sentence 1')")
    page.value("window.scrollTo(0, 0)")
    page.server.go.set()
    page.wait(IDLE)
    assert page.value("scrollY") == 0


def test_it_prints(page: Page, tmp_path: Path):
    page.open()
    page.ask("what is a bond?")
    page.browser.call("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('form, button, .words')].filter(e => e.getClientRects().length)"
    assert page.value(f"{shown}.map(e => e.className)") == ["words", "words"]
    page.browser.call("Emulation.setEmulatedMedia", media="")
    page.browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_the_files_ask_for_nothing_from_elsewhere():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for word in ("://", "innerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=", "onclick="):
            assert word not in text, f"{file.name}: {word}"


def test_the_policy_is_the_servers():
    assigned = [node for node in ast.parse((PAGE.parent / "guard.py").read_text()).body if isinstance(node, ast.Assign)]
    values = {ast.unparse(node.targets[0]): node.value for node in assigned}
    assert ast.literal_eval(values["POLICY"]) == POLICY
