"""Stands before every route: who asks, from which host, how much, and what a browser may do with the reply."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from loramix.errors import LoramixError
from loramix.serving.keys import Keys
from loramix.serving.limits import Limits
from loramix.serving.metrics import Metrics
from loramix.serving.replies import error

OPEN_PATHS = frozenset({"/health"})
"""What answers without a key: enough for a load balancer, and nothing about the model."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Guard:
    """The outermost layer of the app.

    Attributes:
        failed: why the engine did not start; the server then ends.

    Args:
        app: what is guarded.
        keys: who may come in; empty for everybody.
        limits: of a request.
        metrics: counts requests.
        any_host: whether a request may name any host. If not, only loopback names: else a page of another site, whose
            name was made to point here, could talk to a server without key.
    """

    def __init__(self, app: App, keys: Keys, limits: Limits, metrics: Metrics, *, any_host: bool) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._any_host = any_host
        self.failed: LoramixError | None = None

    def _without_traceback(self, send: Send) -> Send:
        """What is known to have gone wrong is said in a line, by who started the server."""

        async def sent(message: Message) -> None:
            if self.failed is not None and message["type"] == "lifespan.startup.failed":
                message["message"] = ""
            await send(message)

        return sent

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, self._without_traceback(send))
            return
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check_host(headers.get(b"host", b""))
            scope.setdefault("state", {})["key"] = self._check_key(scope["path"], headers.get(b"authorization"))
            body = await self._body(headers.get(b"content-length"), receive)
            await self._app(scope, _again(body, receive), sent)
        except _Refused as refused:
            await _refuse(refused, sent)
        finally:
            route = scope.get("route")
            self._metrics.request(getattr(route, "path", "other"), status)

    def _check_host(self, host: bytes) -> None:
        named = host.decode("latin-1")
        bare = named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]
        if not self._any_host and bare.lower() not in LOOPBACK:
            raise _Refused(400, "This server answers to localhost only.", "wrong_host")

    def _check_key(self, path: str, authorization: bytes | None) -> Any:
        if not self._keys or path in OPEN_PATHS:
            return None
        found = self._keys.found(None if authorization is None else authorization.decode("latin-1"))
        if found is None:
            # Basic too: a browser then asks for the key itself, before it shows the page.
            ways = ((b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="loramix"'))
            raise _Refused(401, "A key is needed: send it as Authorization: Bearer KEY.", "invalid_api_key", ways)
        return found

    async def _body(self, announced: bytes | None, receive: Receive) -> bytes:
        """Returns the whole body, which is never longer than the limit nor takes longer than its time."""
        most = self._limits.body_bytes
        if announced is not None and announced.isdigit() and int(announced[:20]) > most:
            raise _Refused(413, f"The body has more than {most} bytes.", "body_too_large")
        body = b""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _Refused(413, f"The body has more than {most} bytes.", "body_too_large")
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return body
        except TimeoutError:
            raise _Refused(408, "The body took too long to arrive.", "body_timeout") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """Returns what an app receives: the body that was read, then whatever follows (that the client left)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(refused: _Refused, send: Send) -> None:
    kind = "authentication_error" if refused.status == 401 else "invalid_request_error"
    body = json.dumps(error(str(refused), kind=kind, code=refused.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refused.headers]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
