"""A chat endpoint of our own on this machine, which answers what a test tells it to, and a judge that asks it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from loramix.evaluation.chat_endpoint import CachedChat, Endpoint
from loramix.evaluation.judge import Answered, Judge

KEY = "sk-never-shown"
ANSWERS = [Answered(f"question {n}", f"reference {n}", f"answer {n}") for n in range(5)]
Said = tuple[int, object, dict[str, str]]


class FakeEndpoint:
    """Answers with what `answer` makes of a request's body and its number; keeps what it was sent."""

    def __init__(self, answer: Callable[[dict, int], str | Said]) -> None:
        fake = self
        self.answer = answer
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(fake.bodies)
                    fake.bodies.append(body)
                    fake.keys.append(self.headers.get("authorization"))
                said = fake.answer(body, number)
                status, content, headers = (200, _completion(said), {}) if isinstance(said, str) else said
                if self.path != "/v1/chat/completions":
                    status = 404
                raw = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def _completion(text: str) -> dict:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


@contextmanager
def endpoints() -> Iterator[Callable[..., FakeEndpoint]]:
    """Yields a function that starts an endpoint; all of them are stopped at the end."""
    started: list[FakeEndpoint] = []

    def start(answer: Callable[[dict, int], str | Said]) -> FakeEndpoint:
        one = FakeEndpoint(answer)
        threading.Thread(target=one.server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(one)
        return one

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


def judge_at(one: FakeEndpoint, tmp_path: Path, waits: list[float] | None = None, **how: object) -> Judge:
    endpoint = Endpoint(one.url, "gpt-fake", KEY, input_price=2.0, output_price=10.0)
    kept = waits if waits is not None else []

    def wait(_: threading.Event, seconds: float) -> None:
        kept.append(seconds)

    return Judge(CachedChat(endpoint, tmp_path / "judge.jsonl", **{"workers": 1, "wait": wait, **how}))


def score_reply(points: object) -> str:
    return json.dumps({"reason": "so", "score": points})


def winner_reply(name: str) -> str:
    return json.dumps({"reason": "so", "winner": name})


def shown(body: dict, name: str) -> str:
    """Returns what stands between the marks of one text of a request."""
    (found,) = re.findall(rf"<<{name} [0-9a-f]+>>\n(.*?)\n<</{name} [0-9a-f]+>>", body["messages"][1]["content"], re.S)
    return found
