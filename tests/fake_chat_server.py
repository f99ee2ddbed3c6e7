"""A stand-in for `loramix serve`: the chat page's own files, the same policy, and answers that a word asks for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import loramix

PAGE = Path(loramix.__file__).parent / "serving" / "page"
# As in serving/guard.py, which takes torch and the server's own libraries to import.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
EXPERTS = ("finance", "maths", "medicine")
MARKUP = "<img src=x onerror=document.title='broken'><script>document.title='broken'</script>**not bold**"
Refusal = tuple[int, str, dict[str, str]]
REFUSALS: dict[str, Refusal] = {
    "busy": (429, "Too many requests wait.", {"Retry-After": "7"}),
    "forbidden": (400, "max_tokens = 9999: this server writes 1024 at most.", {}),
    "mistake": (500, "Its log says more.", {}),
}


class FakeChatServer:
    """Use as a context. Words of the last message choose what happens: busy, forbidden, mistake, slow, broken, cut,
    markup, long, unlike, mixed.

    Attributes:
        bodies: of the requests for answers, in order.
        paths: asked for.
        key: the key it wants, None for none.
        experts: that can be named.
        go: what the second half of a "slow" answer waits for.
        left: set when a reader leaves a "slow" answer before its end.
    """

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        self.key: str | None = None
        self.experts = EXPERTS
        self.go, self.left = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> FakeChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()

    def refusal(self, question: str) -> Refusal | None:
        return next((refusal for word, refusal in REFUSALS.items() if word in question), None)

    def events(self, body: dict) -> Iterator[dict]:
        """Yields the events of one answer."""
        question = body["messages"][-1]["content"]
        pin = body["model"].partition(":")[2]
        yield {"choices": [_choice({"role": "assistant", "content": ""})], "routing": _routing(question, pin)}
        for n, word in enumerate(_words(question, pin)):
            if n == 2 and "slow" in question:
                # Short waits with something to send in each: only so is it seen that a reader has left.
                while not self.go.wait(0.05):
                    yield {"choices": []}
            if n == 2 and "broken" in question:
                yield {"error": {"message": "The engine stopped.", "type": "server_error", "param": None, "code": None}}
                return
            yield {"choices": [_choice({"content": word})]}
        yield {"choices": [_choice({}, "length" if "cut" in question else "stop")]}
        yield {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}


def _choice(delta: dict, reason: str | None = None) -> dict:
    return {"index": 0, "delta": delta, "finish_reason": reason}


def _words(question: str, pin: str) -> list[str]:
    if "markup" in question:
        return [MARKUP]
    if "long" in question:
        return [f"sentence {n} of a long answer that fills the screen.\n" for n in range(40)]
    return ["An answer", f" by {pin or 'the mixture'}", " to: ", question]


def _routing(question: str, pin: str) -> dict:
    told: dict = {"expert": pin, "decision": "pinned", "probability": None, "probabilities": {}}
    calibration: dict = {"score": None, "threshold": None}
    if not pin:
        probabilities = {"maths": 0.04, "finance": 0.93, "medicine": 0.03}
        told = {"expert": "finance", "decision": "last", "probability": 0.93, "probabilities": probabilities}
        if "unlike" in question:
            told = {"expert": "base", "decision": "last", "probability": None, "probabilities": probabilities}
            calibration = {"score": 3.214, "threshold": 2.8}
        if "mixed" in question:
            told = {"expert": None, "decision": "token", "probability": None, "probabilities": {}}
    return told | calibration


def _models(experts: tuple[str, ...]) -> dict:
    rows = [("demo", None, "mixture"), *((f"demo:{name}", "demo", "expert") for name in experts)]
    rows.append(("demo:base", "demo", "base"))
    about = {"object": "model", "created": 0, "owned_by": "loramix"}
    return {"object": "list", "data": [{"id": i, **about, "parent": p, "kind": k} for i, p, k in rows]}


def _handler(fake: FakeChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.paths.append(self.path)
            name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
            if self.path == "/v1/models":
                self._json(200, _models(fake.experts), {}) if self._let_in() else None
            elif "/" not in name and (PAGE / name).is_file():
                self._send(200, (PAGE / name).read_bytes(), {"Content-Type": TYPES[name.rpartition(".")[2]]})
            else:
                self._refuse((404, "No such file.", {}))

        def do_POST(self) -> None:
            fake.paths.append(self.path)
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self._let_in():
                return
            fake.bodies.append(body)
            refusal = fake.refusal(body["messages"][-1]["content"])
            if refusal is not None:
                self._refuse(refusal)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for event in fake.events(body):
                    # In two halves: what arrives is not cut where events end.
                    raw = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
                    for half in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
                        self.wfile.write(half)
                        self.wfile.flush()
                    time.sleep(0.01)
                    if "error" in event:
                        return
                self.wfile.write(b"data: [DONE]\n\n")
            except ConnectionError:
                fake.left.set()

        def _let_in(self) -> bool:
            if fake.key is None or self.headers.get("authorization") == f"Bearer {fake.key}":
                return True
            self._refuse((401, "A key is needed.", {}))
            return False

        def _refuse(self, refusal: Refusal) -> None:
            status, message, headers = refusal
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            self._json(status, {"error": error}, headers)

        def _json(self, status: int, content: dict, headers: dict[str, str]) -> None:
            self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})

        def _send(self, status: int, raw: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def end_headers(self) -> None:
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
