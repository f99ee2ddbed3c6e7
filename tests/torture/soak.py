"""Many short requests to a server of the tiny mixture, and clients that leave: memory and descriptors stay, places are
free again.

    python -m tests.torture.soak [--requests 10000] [--leaving 500]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn

from loramix.cli.output import quiet_libraries
from tests import serving_case
from tests.torture.forks import fork

CLIENTS = 8
PROMPTS = ("add 1 and 2", "greet me", "shout", "what is it?", "1+1=", "hello there, who are you?")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--leaving", type=int, default=500, help="clients that leave in the middle of an answer")
    args = parser.parse_args()
    quiet_libraries()
    found = soak(args.requests, args.leaving)
    print(json.dumps(found))
    return int(found["failed"] > 0 or found["memory_growth"] >= 0.02 or found["busy_after"] > 0 or found["fds"] > 2)


def soak(requests: int, leaving: int) -> dict[str, Any]:
    """Returns failures, growth of memory as a share, descriptors more than before, and places that are still taken.

    Memory is compared between the first tenth of the requests (buffers of every size have been needed then) and the
    end.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "port"
        process, wait = fork(lambda: _serve(told))
        try:
            port = _port(told)
            started = time.monotonic()
            failed = _all(requests // 10, lambda number: _ask(port, number))
            memory, descriptors = _memory(process), _descriptors(process)
            failed += _all(requests - requests // 10, lambda number: _ask(port, number))
            seconds = time.monotonic() - started
            failed += _all(leaving, lambda number: _leave(port, number))
            busy = _busy_after(port, 5.0)
            failed += _all(CLIENTS, lambda number: _ask(port, number))
            after = _memory(process)
            return {
                "requests": requests,
                "leaving": leaving,
                "failed": failed,
                "memory_mb": round(after / 1e6, 1),
                "memory_growth": round(after / memory - 1, 4),
                "fds": _descriptors(process) - descriptors,
                "busy_after": busy,
                "requests_per_s": round(requests / seconds, 1),
            }
        finally:
            os.kill(process, signal.SIGKILL)
            wait()


def _serve(told: Path) -> None:
    torch.set_num_threads(1)
    app, _ = serving_case.app_of(queue=64)
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen(128)
        told.write_text(str(own.getsockname()[1]))
        uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[own])


def _port(told: Path) -> int:
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.05)
    return int(told.read_text())


def _all(count: int, work: Callable[[int], bool]) -> int:
    """Does something `count` times from several threads; returns how often it failed."""
    left, failed, lock = iter(range(count)), [0], threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                well = work(number)
            except OSError as error:
                print(f"request {number}: {error}")
                well = False
            if not well:
                with lock:
                    failed[0] += 1

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed[0]


def _body(number: int, **more: Any) -> bytes:
    draw = random.Random(number)
    model = draw.choice(["demo", "demo", "demo", "demo:base"])
    prompt = " ".join(draw.choices(PROMPTS, k=draw.randrange(1, 4)))
    content = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": draw.randrange(1, 9)}
    return json.dumps({**content, **more}).encode()


def _ask(port: int, number: int) -> bool:
    stream = number % 3 == 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", _body(number, stream=stream), headers)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status == 200 and (content.rstrip().endswith(b"[DONE]") if stream else b'"usage"' in content)
    finally:
        connection.close()


def _leave(port: int, number: int) -> bool:
    """Leaves a request whose answer would be long: before it begins, at its first bytes, or some time later."""
    body = _body(number, stream=number % 2 == 0, max_tokens=64)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        if number % 3 == 1:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                connection.recv(64)
        elif number % 3 == 2:
            time.sleep(random.Random(number).uniform(0, 0.05))
    return True


def _busy_after(port: int, seconds: float) -> int:
    """Returns how many requests are in the server's hands, waiting at most so long for none."""
    deadline = time.monotonic() + seconds
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        busy = sum(
            float(one)
            for one in re.findall(r"^loramix_(?:requests_waiting|answers_writing) (\S+)$", text, re.MULTILINE)
        )
        if not busy or time.monotonic() > deadline:
            return int(busy)
        time.sleep(0.05)


def _memory(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors(process: int) -> int:
    """Returns how many are open, the least within a second: the server sees late that a client has closed."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir(f"/proc/{process}/fd")))
        time.sleep(0.05)
    return min(counts)


if __name__ == "__main__":
    raise SystemExit(main())
