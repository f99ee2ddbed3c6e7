"""A chat endpoint of our own on this machine, which answers what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
