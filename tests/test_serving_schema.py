"""Thousands of requests made from the server's own OpenAPI schema, right ones and wrong ones: no 5xx, wrong ones are
refused, and every reply is what the schema says. How many: LORAMIX_FUZZ (`make fuzz`: 20,000)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests import serving_case

CASES = int(os.environ.get("LORAMIX_FUZZ", "5000"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/route")
MODELS = ("demo", "demo:red", "demo:base", None)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    app, engine = serving_case.app_of(places=4, queue=8, max_tokens=3)
    with serving_case.running(app) as found:
        yield found
        assert engine.alive
        assert serving_case.idle(engine)


@pytest.mark.filterwarnings("ignore")  # schemathesis' own
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("path", POSTS)
def test_requests_made_from_the_schema(path: str, mode: GenerationMode, address: str):
    share = CASES // (2 * len(POSTS)) + 1
    operation = schemathesis.openapi.from_url(f"{address}/openapi.json")[path]["POST"]
    statuses: Counter[int] = Counter()
    said: Counter[str] = Counter()

    @settings(
        max_examples=share,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            _make_answerable(case.body, path)
        response = case.call(base_url=address)
        statuses[response.status_code] += 1
        if response.status_code == 400:
            said[json.loads(response.text)["error"]["message"][:60]] += 1
        # A body of more than a megabyte is refused unread; schemathesis does not count that status as a refusal.
        refused = [negative_data_rejection] if response.status_code == 413 else []
        case.validate_response(response, checks=CHECKS, excluded_checks=refused)

    call()
    assert sum(statuses.values()) >= share
    assert not any(status >= 500 for status in statuses), statuses
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] > share / 10, f"hardly any was answered: {statuses}, {said.most_common(5)}"
    else:
        assert statuses[200] == 0, statuses


def _make_answerable(body: dict[str, Any], path: str) -> None:
    """Names and numbers that nobody made up would never be hit: puts some in, the same for the same body."""
    body["model"] = MODELS[len(body["model"]) % len(MODELS)] or body["model"]
    if path != "/v1/route":
        body["max_tokens"] = 2
    if isinstance(body.get("prompt"), list):
        body["prompt"] = [token % 259 for token in body["prompt"]]
