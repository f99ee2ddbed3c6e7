"""A request on its way through an engine's thread, and the way its events take back to the event loop."""

from __future__ import annotations

import asyncio
import time

from loramix.serving.ask import Ask, EngineError, Event


class Job:
    """One request. The engine's thread says events; the event loop reads them.

    Args:
        ask: what is asked.
        only_route: nothing is to be written.
    """

    def __init__(self, ask: Ask, *, only_route: bool = False) -> None:
        self.ask, self.only_route = ask, only_route
        self.events: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        self.deadline = time.monotonic() + ask.seconds
        self._loop = asyncio.get_running_loop()
        self._left = 0 if only_route else ask.answers
        self.over = False
        """Nothing more is to be done for it: it ended, failed, or whoever asked has left."""

    def say(self, event: Event | EngineError) -> None:
        """Hands an event to the event loop; for the engine's thread."""
        if self.over:
            return
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody listens any more
            self.over = True

    def end(self, event: Event) -> None:
        """Says that one answer ended; with the last of them the job is over."""
        self.say(event)
        self._left -= 1
        self.over = self.over or self._left <= 0

    def fail(self, error: EngineError) -> None:
        """Says that the request cannot be answered, and ends it."""
        self.say(error)
        self.over = True
