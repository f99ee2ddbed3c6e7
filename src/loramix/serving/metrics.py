"""What the server counts, in Prometheus' form. Each server has counters of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loramix.serving.ask import Routed

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server.

    Args:
        queue: returns how many answers are being written, and how many requests wait.
    """

    def __init__(self, queue: Callable[[], tuple[int, int]]) -> None:
        self._registry = CollectorRegistry()
        own: Any = {"registry": self._registry}
        self._requests = Counter("loramix_requests", "Requests by route and status.", ["route", "status"], **own)
        self._tokens = Counter("loramix_tokens", "Tokens read (prompt) and written (completion).", ["kind"], **own)
        self._experts = Counter("loramix_expert_requests", "Requests by the expert that answered.", ["expert"], **own)
        self._first = Histogram(
            "loramix_time_to_first_token_seconds", "From the request to its first token.", buckets=_SECONDS, **own
        )
        self._whole = Histogram("loramix_request_seconds", "From the request to its end.", buckets=_SECONDS, **own)
        self._entropy = Histogram(
            "loramix_router_entropy",
            "Entropy of what routed requests' decisions compared, as a share of the largest possible.",
            buckets=[n / 10 for n in range(11)],
            **own,
        )
        writing = Gauge("loramix_answers_writing", "Answers being written.", **own)
        writing.set_function(lambda: queue()[0])
        waiting = Gauge("loramix_requests_waiting", "Requests that wait for a place.", **own)
        waiting.set_function(lambda: queue()[1])

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def routed(self, routed: Routed) -> None:
        self._experts.labels(routed.expert or "mixed").inc()
        shares = list(routed.probabilities.values())
        if routed.decision not in ("pinned", "told") and len(shares) > 1:
            entropy = -sum(share * math.log(share) for share in shares if share > 0)
            self._entropy.observe(entropy / math.log(len(shares)))

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def answered(self, prompt: int, completion: int, seconds: float) -> None:
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Returns all of it as Prometheus reads it."""
        return generate_latest(self._registry)
