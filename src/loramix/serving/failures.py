"""Errors of every kind as replies in OpenAI's shape."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from loramix.serving.answering import Gone
from loramix.serving.ask import EngineError
from loramix.serving.replies import error


def add_to(app: FastAPI) -> None:
    """Makes an app answer all errors so."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(Exception, _mistake)


def _reply(status: int, message: str, *, param: str | None = None, retry_after: int | None = None) -> JSONResponse:
    kinds = {404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    code = {404: "not_found", 429: "rate_limit_exceeded"}.get(status)
    headers = None if retry_after is None else {"retry-after": str(retry_after)}
    return JSONResponse(error(message, kind=kind, param=param, code=code), status, headers)


async def _invalid(_: Request, failed: Exception) -> Response:
    assert isinstance(failed, RequestValidationError)
    found = []
    for one in failed.errors()[:8]:
        # The input itself is not repeated: it may be long, and is none of the log's business.
        place = ".".join(str(part) for part in one["loc"] if part != "body")
        found.append(f"{place or 'body'}: {one['msg']}")
    places = [one["loc"][1:] for one in failed.errors()]
    param = str(places[0][0]) if places and places[0] else None
    return _reply(400, "; ".join(found), param=param)


async def _http_error(_: Request, failed: Exception) -> Response:
    assert isinstance(failed, HTTPException)
    reply = _reply(failed.status_code, str(failed.detail))
    reply.headers.update(failed.headers or {})
    return reply


async def _engine_error(_: Request, failed: Exception) -> Response:
    assert isinstance(failed, EngineError)
    return _reply(failed.status, str(failed), retry_after=failed.retry_after)


async def _gone(_: Request, failed: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log and the counters do


async def _mistake(_: Request, failed: Exception) -> Response:
    return _reply(500, "The server made a mistake on this request. Its log says more.")
