"""Asking an endpoint: tries again, gives up with one error, goes on where it was stopped."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from loramix.errors import ConfigError
from loramix.evaluation.chat_endpoint import Endpoint, endpoint_for
from loramix.evaluation.judge import Answered
from tests.fake_endpoint import ANSWERS, KEY, FakeEndpoint, endpoints, judge_at, score_reply, shown


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeEndpoint]]:
    with endpoints() as start:
        yield start


def test_busy_endpoints_are_asked_again_after_a_while(fake, tmp_path):
    busy = [(429, {}, {"retry-after": "7"}), (503, {}, {}), (500, {}, {"retry-after": "100000"})]
    one = fake(lambda _, number: busy[number] if number < 3 else score_reply(50))
    waits: list[float] = []
    assert judge_at(one, tmp_path, waits).scores(ANSWERS[:1]) == [50]
    assert waits == [7.0, 2.0, 60.0]


def test_an_endpoint_that_stays_down_ends_in_one_error_and_what_was_answered_is_kept(fake, tmp_path):
    one = fake(lambda _, number: score_reply(10) if number < 2 else (500, {"error": "down"}, {}))
    waits: list[float] = []
    with pytest.raises(ConfigError, match=r"answered 500.*6 times"):
        judge_at(one, tmp_path, waits).scores(ANSWERS[:3])
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2


def test_an_endpoint_nobody_listens_at_is_an_error(fake, tmp_path):
    one = fake(lambda *_: score_reply(1))
    one.server.shutdown()  # first: a thread that has not begun to serve yet would find it closed
    one.server.server_close()
    with pytest.raises(ConfigError, match="cannot be reached"):
        judge_at(one, tmp_path).scores(ANSWERS[:1])


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (404, "base_url"), (400, "max_tokens is old")])
def test_refusals_are_not_tried_again_and_say_what_to_do(fake, tmp_path, status, hint):
    one = fake(lambda *_: (status, {"error": f"no: {KEY} max_tokens is old"}, {}))
    with pytest.raises(ConfigError, match=hint) as caught:
        judge_at(one, tmp_path).scores(ANSWERS)
    assert KEY not in str(caught.value)
    assert len(one.bodies) == 1


def test_after_a_refusal_no_worker_sends_another_request(fake, tmp_path):
    one = fake(lambda *_: (401, {}, {}))
    many = [Answered(f"question {n}", "reference", "answer") for n in range(100)]
    with pytest.raises(ConfigError, match="answered 401"):
        judge_at(one, tmp_path, workers=4).scores(many)
    assert len(one.bodies) <= 4


def test_a_refusal_ends_the_waiting_of_others(fake, tmp_path):
    """Three workers wait for an endpoint that is busy when the fourth is told that its key is wrong."""
    one = fake(lambda body, number: (503, {}, {"retry-after": "60"}) if number < 3 else (401, {}, {}))
    waiting = [Answered(f"question {n}", "reference", "answer") for n in range(4)]
    started = time.monotonic()
    with pytest.raises(ConfigError, match="answered 401"):
        judge_at(one, tmp_path, workers=4, wait=threading.Event.wait).scores(waiting)
    assert time.monotonic() - started < 50
    assert len(one.bodies) == 4


def test_something_else_that_listens_there_is_told_from_a_chat_endpoint(fake, tmp_path):
    one = fake(lambda *_: (200, {"hello": 1}, {}))
    with pytest.raises(ConfigError, match="no chat completion"):
        judge_at(one, tmp_path).scores(ANSWERS[:1])


def test_a_stopped_judgement_asks_only_what_is_missing(fake, tmp_path):
    one = fake(lambda _, number: score_reply(number) if number < 3 else (400, {}, {}))
    with pytest.raises(ConfigError, match="answered 400"):
        judge_at(one, tmp_path).scores(ANSWERS)
    file = tmp_path / "judge.jsonl"
    file.write_text(file.read_text()[:-20])  # killed while the third line was written
    one.bodies.clear()
    one.answer = lambda body, _: score_reply(90)
    assert judge_at(one, tmp_path).scores(ANSWERS) == [0, 1, 90, 90, 90]
    assert sorted(shown(body, "answer") for body in one.bodies) == ["answer 2", "answer 3", "answer 4"]
    one.bodies.clear()
    assert judge_at(one, tmp_path).scores(ANSWERS) == [0, 1, 90, 90, 90]
    assert not one.bodies


def test_nothing_but_the_verdict_and_its_price_is_kept(fake, tmp_path):
    one = fake(lambda *_: score_reply(1))
    judge = judge_at(one, tmp_path)
    judge.scores(ANSWERS[:1])
    assert one.keys == [f"Bearer {KEY}"]
    assert KEY not in (tmp_path / "judge.jsonl").read_text()
    assert KEY not in repr(judge.chat.endpoint)
    assert json.loads((tmp_path / "judge.jsonl").read_text()).keys() == {"request", "text", "input", "output"}


def test_equal_answers_are_judged_once(fake, tmp_path):
    one = fake(lambda *_: score_reply(33))
    assert judge_at(one, tmp_path, workers=4).scores([ANSWERS[0]] * 6) == [33] * 6
    assert len(one.bodies) == 1


def test_without_a_url_there_is_no_endpoint():
    assert endpoint_for("gpt", environment={"OPENAI_API_KEY": KEY}) is None
    named = endpoint_for("gpt", environment={"OPENAI_BASE_URL": "http://there/v1/", "OPENAI_API_KEY": KEY})
    assert named == Endpoint("http://there/v1", "gpt", KEY)
    chosen = endpoint_for("gpt", "https://here/v1", environment={"OPENAI_BASE_URL": "http://there/v1"})
    assert chosen == Endpoint("https://here/v1", "gpt", None)


@pytest.mark.parametrize(
    "url", ["here/v1", "ftp://here/v1", "https://", "https://me:secret@here/v1", "http://here:port/v1"]
)
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ConfigError) as caught:
        endpoint_for("gpt", url, environment={})
    assert "secret" not in str(caught.value)
