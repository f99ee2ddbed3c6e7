"""The engine for throughput: vLLM answers, loramix routes in front of it.

The routing pass runs here on the first layers of the base; the request then goes to vLLM's server with the expert as
its model, as token ids, and its stream comes back as our events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from loramix.errors import ConfigError
from loramix.methods import Method
from loramix.serving.ask import Ask, Ended, EngineError, Event, Piece, Routed
from loramix.serving.model import ServedModel
from loramix.serving.sampling import Chosen
from loramix.serving.vllm_process import VllmProcess
from loramix.tuner.abstaining import BASE

TOKEN = "token_id:"  # noqa: S105 - how vLLM writes a token where it is asked for ids


def check_vllm(method: Method) -> None:
    """Raises a ConfigError if vLLM cannot serve a method."""
    if method.settled_by != "prompt":
        raise ConfigError(
            f"--engine vllm: method {method.name} settles no expert for a prompt (token by token, or told), and vLLM "
            "knows one LoRA for a whole request. Use --engine transformers."
        )


class VllmEngine:
    """Routes, then lets a vLLM server answer.

    Args:
        served: a model whose routers read the base; only its routing is used.
        process: vLLM.
        queue: requests that may be under way beyond those that vLLM writes at a time.
        places: what vLLM writes at a time.

    Raises:
        ConfigError: the method settles no expert for a prompt.
    """

    def __init__(self, served: ServedModel, process: VllmProcess, *, places: int, queue: int) -> None:
        check_vllm(served.method)
        self._served, self._process = served, process
        self._places, self._most = places, places + queue
        self._under_way = 0
        self._reading = asyncio.Semaphore(1)
        self._client: httpx2.AsyncClient | None = None

    @property
    def queue(self) -> tuple[int, int]:
        return min(self._under_way, self._places), max(0, self._under_way - self._places)

    @property
    def alive(self) -> bool:
        return self._process.alive

    async def start(self) -> None:
        await self._process.start()
        headers = {"authorization": f"Bearer {self._process.key}"}
        limits = httpx2.Limits(max_connections=self._most, max_keepalive_connections=self._places)
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.aclose()
        await self._process.stop()

    async def route(self, ask: Ask) -> Routed:
        if ask.expert is not None:
            return self._served.pinned(ask.expert).routed
        async with self._reading:  # the routers' model belongs to one request at a time
            settled = await asyncio.to_thread(self._served.settle, [ask])
        return settled[0].routed

    async def answer(self, ask: Ask) -> AsyncIterator[Event]:
        if self._under_way >= self._most:
            raise EngineError("Too many requests wait. Try again in 5 s.", 429, retry_after=5)
        self._under_way += 1
        deadline = time.monotonic() + ask.seconds
        try:
            routed = await asyncio.wait_for(self.route(ask), ask.seconds)
            yield routed
            async for event in self._written(ask, routed.expert or BASE):
                yield event
                # Looked at between events: a timeout around them would bind this generator to one task.
                if time.monotonic() > deadline:
                    raise TimeoutError
        except (TimeoutError, httpx2.TimeoutException):
            raise EngineError("The answer took too long and was given up.", 504) from None
        except httpx2.HTTPError as error:
            raise EngineError("vLLM does not answer. Its log says more.", 503, retry_after=5) from error
        finally:
            self._under_way -= 1

    async def _written(self, ask: Ask, expert: str) -> AsyncIterator[Event]:
        assert self._client is not None
        counts, ended = [0] * ask.answers, [False] * ask.answers
        body = _body(ask, self._process.models[expert])
        async with self._client.stream(
            "POST", f"{self._process.url}/v1/completions", json=body, timeout=ask.seconds
        ) as reply:
            if reply.status_code != 200:
                said = (await reply.aread()).decode(errors="replace")[:500]
                raise EngineError(f"vLLM refused the request: {said}", 400 if reply.status_code == 400 else 503)
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise EngineError("vLLM failed on this request. Its log says more.", 500)
                for choice in chunk["choices"]:
                    answer, tokens = choice["index"], _tokens(choice)
                    counts[answer] += len(tokens)
                    yield Piece(answer, choice["text"], tokens)
                    if choice.get("finish_reason"):
                        ended[answer] = True
                        yield Ended(answer, choice["finish_reason"], counts[answer])
        if not all(ended):
            raise EngineError("vLLM broke its answer off. Its log says more.", 502)


def _body(ask: Ask, model: str) -> dict[str, Any]:
    """Returns the request as vLLM's completions route takes it."""
    asked = ask.sampling
    return {
        "model": model,
        "prompt": list(ask.prompt_ids),
        "stream": True,
        "n": ask.answers,
        "max_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "seed": None if asked.seed is None else asked.seed % 2**63,
        "stop": list(asked.stop) or None,
        "logprobs": asked.logprobs,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in asked.logit_bias.items()} or None,
        "ignore_eos": asked.ignore_end,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def _tokens(choice: dict[str, Any]) -> tuple[Chosen, ...]:
    """Returns the tokens of a chunk's choice, with their log-probabilities if they were asked for."""
    ids, told = choice.get("token_ids") or [], choice.get("logprobs")
    if not told:
        return tuple(Chosen(token) for token in ids)
    found = []
    for token, logprob, top in zip(ids, told["token_logprobs"], told["top_logprobs"] or [{}] * len(ids), strict=False):
        others = sorted(
            ((int(name.removeprefix(TOKEN)), value) for name, value in (top or {}).items()), key=lambda p: -p[1]
        )
        found.append(Chosen(token, logprob, tuple(others)))
    return tuple(found)
