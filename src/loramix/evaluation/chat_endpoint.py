"""Asks an OpenAI-compatible endpoint: replies are kept, failures tried again, costs counted.

Nothing is sent anywhere unless somebody named a URL, in the settings or in OPENAI_BASE_URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loramix.errors import ConfigError

_AGAIN = {408, 409, 425, 429}
_ATTEMPTS = 6
_LONGEST_WAIT = 60.0
_HINTS = {
    401: " Set OPENAI_API_KEY to a valid key.",
    403: " Set OPENAI_API_KEY to a key that may use this model.",
    404: " Check base_url (it mostly ends in /v1) and the model's name.",
}

Request = dict[str, Any]
"""The body of one chat completion request."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, whom, and at what price.

    Attributes:
        base_url: such as "https://api.openai.com/v1"; "/chat/completions" is put behind it.
        model: the model's name there.
        key: what is sent as bearer token; None sends none. Never shown and never written.
        input_price, output_price: per million tokens, in whatever currency the bill has.
        options: put into every request; a value of None leaves out what loramix would send (temperature, max_tokens).
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    input_price: float = 0.0
    output_price: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def request(self, messages: Sequence[Mapping[str, str]]) -> Request:
        """Returns the body of a request: as repeatable as the endpoint can be asked to be."""
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": 400, **self.options}
        return {name: value for name, value in body.items() if value is not None}


def endpoint_for(
    model: str,
    base_url: str | None = None,
    *,
    input_price: float = 0.0,
    output_price: float = 0.0,
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Endpoint | None:
    """Returns the endpoint of `base_url`, else of OPENAI_BASE_URL; None where neither names one. Sends nothing.

    Raises:
        ConfigError: the URL is none.
    """
    named = base_url or environment.get("OPENAI_BASE_URL")
    if not named:
        return None
    try:
        url = httpx2.URL(named)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"base_url = {named!r}: no URL ({error}). Expected https://host/v1.") from error
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise ConfigError(
            f"base_url with scheme {url.scheme!r} and host {url.host!r}: expected http(s)://host/v1, without user and "
            "password. A key goes into OPENAI_API_KEY."
        )
    key = environment.get("OPENAI_API_KEY") or None
    return Endpoint(named.rstrip("/"), model, key, input_price, output_price, dict(options or {}))


@dataclass(frozen=True)
class Reply:
    """What the endpoint wrote, and the tokens it counted for that (0 where it tells none)."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Cost:
    """Requests, tokens and money; an estimate before, what the endpoint counted afterwards."""

    requests: int
    kept: int
    """Requests of these that were answered before and are not sent again."""
    input_tokens: int
    output_tokens: int
    money: float

    def text(self, *, estimated: bool) -> str:
        """Returns one line to show."""
        about = "about " if estimated else ""
        return (
            f"{self.requests} requests, {self.kept} of them answered before; {about}{self.input_tokens:,} tokens in, "
            f"{self.output_tokens:,} out, {about}{self.money:.4f} at the prices given"
        )


class CachedChat:
    """Sends requests and keeps every reply in a file, so that a stopped judgement goes on where it was.

    Args:
        endpoint: whom to ask.
        cache: JSON lines, one for each reply, found again by the sha256 of URL and request. Holds replies, no key.
        workers: requests under way at the same time.
        wait: how to wait, for an event but so many seconds at most.
        timeout: seconds until a request counts as failed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        cache: Path,
        *,
        workers: int = 4,
        wait: Callable[[threading.Event, float], object] = threading.Event.wait,
        timeout: float = 120.0,
    ) -> None:
        self.endpoint = endpoint
        self.cache = cache
        self.workers = workers
        self._wait = wait
        self._timeout = timeout
        self._lock = threading.Lock()
        self._kept = _read_cache(cache)
        self._before = frozenset(self._kept)
        self._used: set[str] = set()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns the reply to each request. Equal requests are sent once, known ones not at all.

        Raises:
            ConfigError: the endpoint refuses, or cannot be reached after several tries. Replies so far are kept.
        """
        names = [self._name(request) for request in requests]
        self._used |= set(names)
        missing = {name: request for name, request in zip(names, requests, strict=True) if name not in self._kept}
        if missing:
            self._send_all(missing)
        return [self._kept[name] for name in names]

    def estimate(self, requests: Sequence[Request], output_tokens: int = 60) -> Cost:
        """Returns roughly what the requests not answered yet will cost.

        Args:
            requests: what is to be asked.
            output_tokens: expected for each reply.
        """
        named = {self._name(request): request for request in requests}
        missing = [request for name, request in named.items() if name not in self._kept]
        read = sum(_rough_tokens(message["content"]) for request in missing for message in request["messages"])
        written = output_tokens * len(missing)
        return Cost(len(named), len(named) - len(missing), read, written, self._price(read, written))

    def cost(self) -> Cost:
        """Returns what all requests used so far have cost, those answered in an earlier run included."""
        read = sum(self._kept[name].input_tokens for name in self._used if name in self._kept)
        written = sum(self._kept[name].output_tokens for name in self._used if name in self._kept)
        return Cost(len(self._used), len(self._used & self._before), read, written, self._price(read, written))

    def _price(self, read: int, written: int) -> float:
        return (read * self.endpoint.input_price + written * self.endpoint.output_price) / 1e6

    def _name(self, request: Request) -> str:
        whole = json.dumps([self.endpoint.base_url, request], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    def _send_all(self, missing: Mapping[str, Request]) -> None:
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        headers = {"Authorization": f"Bearer {self.endpoint.key}"} if self.endpoint.key else {}
        given_up = threading.Event()
        with httpx2.Client(headers=headers, timeout=self._timeout) as client:
            pool = ThreadPoolExecutor(self.workers)
            try:
                waiting = [
                    pool.submit(self._send, client, name, request, given_up) for name, request in missing.items()
                ]
                for one in as_completed(waiting):
                    one.result()
            finally:
                given_up.set()
                pool.shutdown(cancel_futures=True)

    def _send(self, client: httpx2.Client, name: str, request: Request, given_up: threading.Event) -> None:
        """Asks and keeps the reply. The worker that fails tells the others itself: until the thread that waits for them
        has seen the error, they would send what nobody wants any more."""
        try:
            reply = self._try(client, request, given_up)
        except BaseException:
            given_up.set()
            raise
        if reply is None:
            return
        line = {"request": name, "text": reply.text, "input": reply.input_tokens, "output": reply.output_tokens}
        with self._lock:
            with self.cache.open("a", encoding="utf-8") as file:
                # A line that a killed run left unfinished must not swallow this one.
                torn = file.tell() > 0 and not _ends_in_newline(self.cache)
                file.write(("\n" if torn else "") + json.dumps(line, ensure_ascii=False) + "\n")
            self._kept[name] = reply

    def _try(self, client: httpx2.Client, request: Request, given_up: threading.Event) -> Reply | None:
        """Returns the reply, after as many tries as it takes; what only another setting can mend is raised at once.
        None where all was given up meanwhile."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            wait = min(2.0**attempt, _LONGEST_WAIT)
            if given_up.is_set():
                return None
            try:
                response = client.post(f"{self.endpoint.base_url}/chat/completions", json=request)
            except httpx2.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__}: {error})"
            else:
                if response.status_code == 200:
                    return _reply_of(response, self.endpoint)
                problem = f"answered {response.status_code}: {self._without_key(response.text)[:300]!r}"
                if response.status_code not in _AGAIN and response.status_code < 500:
                    hint = _HINTS.get(response.status_code, "")
                    raise ConfigError(f"the judge's endpoint {self.endpoint.base_url} {problem}.{hint}")
                wait = _asked_to_wait(response) or wait
            if attempt < _ATTEMPTS - 1:
                self._wait(given_up, wait)
        raise ConfigError(
            f"the judge's endpoint {self.endpoint.base_url} {problem}, {_ATTEMPTS} times. What was answered so far is "
            "kept; start again later."
        )

    def _without_key(self, text: str) -> str:
        """Returns a text to show; some endpoints repeat the key they were sent."""
        return text.replace(self.endpoint.key, "***") if self.endpoint.key else text


def _reply_of(response: httpx2.Response, endpoint: Endpoint) -> Reply:
    try:
        content = response.json()
        text = content["choices"][0]["message"]["content"]
        used = content.get("usage") or {}
        return Reply(text or "", int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the judge's endpoint {endpoint.base_url} answered {response.text[:200]!r}, which is no chat completion. "
            "Check base_url: it mostly ends in /v1."
        ) from error


def _asked_to_wait(response: httpx2.Response) -> float | None:
    """Returns the seconds of Retry-After, within reason; its other form, a date, is left to the back-off."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), _LONGEST_WAIT) if asked.isdigit() else None


def _read_cache(cache: Path) -> dict[str, Reply]:
    """Returns the kept replies; a line that was cut off by a kill is as good as missing."""
    kept: dict[str, Reply] = {}
    if not cache.is_file():
        return kept
    for line in cache.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found = json.loads(line)
            kept[found["request"]] = Reply(str(found["text"]), int(found["input"]), int(found["output"]))
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _rough_tokens(text: str) -> int:
    """Returns about how many tokens a text has: four letters of a Latin script make one, others about one each."""
    plain = sum(char.isascii() for char in text)
    return plain // 4 + len(text) - plain + 4
