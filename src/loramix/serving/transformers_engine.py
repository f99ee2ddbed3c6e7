"""The default engine: one copy of the base, rows of different experts in one batch, requests joining and leaving at
every step (continuous batching).

One thread owns the model. It settles and reads the prompts that wait, as many as there are places for, then writes one
token of every row, and begins again. The event loop only hands requests over and reads what is said.

transformers' own continuous batching is not used: it lays all requests into one row of tokens, where an expert per
request cannot be told, and shares prefixes whatever the expert (docs/decisions/0010-own-batching.md).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

import torch

from loramix.serving.ask import Ask, Ended, EngineError, Event, Routed
from loramix.serving.job import Job
from loramix.serving.lane import Rows
from loramix.serving.model import Lane, ServedModel, Settled

PREFILL_TOKENS = 2048
"""Tokens, padding included, of the prompts that are read together at most (one prompt may have more)."""
_LOG = logging.getLogger(__name__)


class TransformersEngine:
    """Continuous batching on the transformers model of a run.

    Args:
        served: the model.
        places: answers written at a time.
        queue: requests that may wait.
    """

    def __init__(self, served: ServedModel, *, places: int = 16, queue: int = 64) -> None:
        self.served, self.places, self._most_waiting = served, places, queue
        lanes: list[Lane] = ["mixture"]
        if served.has_base and served.settled_by != "prompt":
            lanes.append("base")
        self._lanes = {lane: Rows(served, lane, places) for lane in lanes}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._seconds_per_job = 1.0

    @property
    def queue(self) -> tuple[int, int]:
        """How many answers are being written, and how many requests wait."""
        return self._writing(), len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    async def start(self) -> None:
        """Starts the thread that owns the model."""
        self._thread = threading.Thread(target=self._run, name="loramix-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Gives all requests up and ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def route(self, ask: Ask) -> Routed:
        job = Job(ask, only_route=True)
        self._hand_over(job)
        try:
            event = await job.events.get()
        finally:
            job.over = True
        if isinstance(event, EngineError):
            raise event
        assert isinstance(event, Routed)
        return event

    async def answer(self, ask: Ask) -> AsyncIterator[Event]:
        job = Job(ask)
        self._hand_over(job)
        left = ask.answers
        try:
            while left:
                event = await job.events.get()
                if isinstance(event, EngineError):
                    raise event
                left -= isinstance(event, Ended)
                yield event
        finally:
            job.over = True
            with self._changed:
                self._changed.notify_all()

    def _hand_over(self, job: Job) -> None:
        with self._changed:
            if not self.alive or self._stopping:
                raise EngineError("The engine is not running.", 503, retry_after=5)
            if len(self._waiting) >= self._most_waiting:
                ahead = (len(self._waiting) + self._writing()) * self._seconds_per_job / self.places
                wait = min(60, max(1, math.ceil(ahead)))
                raise EngineError(f"Too many requests wait. Try again in {wait} s.", 429, retry_after=wait)
            self._waiting.append(job)
            self._changed.notify_all()

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def _writing(self) -> int:
        return sum(len(lane.rows) for lane in self._lanes.values())

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._writing() or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
                jobs = self._next_jobs()
            if jobs:
                self._begin(jobs)
            for lane in self._lanes.values():
                self._step(lane)
        for job in [*self._waiting, *(row.job for lane in self._lanes.values() for row in lane.rows)]:
            job.fail(EngineError("The server is stopping.", 503))

    def _next_jobs(self) -> list[Job]:
        """Takes from the queue, in order, what there are places and tokens for."""
        now, free, widest = time.monotonic(), self.places - self._writing(), 0
        for job in self._waiting:
            if now > job.deadline:
                job.fail(EngineError("The request waited too long for a place.", 503, retry_after=5))
        self._waiting = deque(job for job in self._waiting if not job.over)
        taken: list[Job] = []
        while self._waiting:
            job = self._waiting[0]
            needs = 0 if job.only_route else job.ask.answers
            widest = max(widest, len(job.ask.prompt_ids))
            if needs > free or (taken and widest * (len(taken) + 1) > PREFILL_TOKENS):
                break
            free -= needs
            taken.append(self._waiting.popleft())
        return taken

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Settles some jobs and reads the prompts of those that want an answer."""
        try:
            settled = self.served.settle([job.ask for job in jobs])
        except EngineError as error:
            self._one_by_one(jobs, error)
            return
        except Exception as error:  # one request must not end the server
            self._one_by_one(jobs, _failure(error))
            return
        by_lane: dict[Lane, list[tuple[Job, Settled]]] = {}
        for job, one in zip(jobs, settled, strict=True):
            job.say(one.routed)
            if not job.only_route:
                by_lane.setdefault(one.lane, []).append((job, one))
        for lane, pairs in by_lane.items():
            self._read(self._lanes[lane], pairs)

    def _read(self, lane: Rows, pairs: Sequence[tuple[Job, Settled]]) -> None:
        """Reads the prompts of some jobs and begins their answers; where several fail together, finds out which one."""
        try:
            read = lane.read([job for job, _ in pairs], [one for _, one in pairs])
        except Exception as error:
            if len(pairs) == 1:
                pairs[0][0].fail(_failure(error))
                return
            for pair in pairs:
                self._read(lane, [pair])
            return
        for place, (job, one) in enumerate(pairs):
            try:
                lane.begin(read, place, job, one)
            except Exception as error:
                job.fail(_failure(error))
                lane.drop()
                if not lane.rows:
                    lane.clear()

    def _one_by_one(self, jobs: Sequence[Job], error: EngineError) -> None:
        """Fails the job that cannot be settled; where there are several, finds out which."""
        if len(jobs) == 1:
            jobs[0].fail(error)
            return
        for job in jobs:
            self._begin([job])

    def _step(self, lane: Rows) -> None:
        started, before = time.monotonic(), {id(row.job): row.job for row in lane.rows}
        for job in before.values():
            if started > job.deadline:
                job.fail(EngineError("The answer took too long and was given up.", 504))
        try:
            lane.step()
        except Exception as error:
            for row in lane.rows:
                row.job.fail(_failure(error))
            lane.clear()
        for job in before.values():
            if job.over:
                took = time.monotonic() - (job.deadline - job.ask.seconds)
                self._seconds_per_job += 0.1 * (took - self._seconds_per_job)


def _failure(error: Exception) -> EngineError:
    """Returns what the client is told of an exception; the whole of it goes to the log."""
    _LOG.error("the engine failed on a request", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return EngineError("The server has not enough memory for this request now.", 503, retry_after=10)
    return EngineError("The server failed on this request. Its log says more.", 500)
