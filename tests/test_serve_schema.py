"""The server against its own description: anything that it allows or forbids, made up at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

import fastdllm_ext as fd
from fastdllm_ext.serve.app import create_app
from serving import PATHS, demo, served

OTHERS = ("/v1/models", "/v1/models/{model}", "/health", "/metrics")
CASES = [
    *((path, mode, 100) for path in PATHS for mode in GenerationMode),
    *((path, GenerationMode.POSITIVE, 5) for path in OTHERS),
]


@pytest.fixture(scope="module")
def description() -> Iterator[Any]:
    with fd.Engine(*demo(), max_rows=16) as engine:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(served(engine)))


@pytest.mark.parametrize("path, mode, examples", CASES)
def test_what_the_description_says(description: Any, path: str, mode: GenerationMode, examples: int) -> None:
    operation = next(iter(description[path].values()))
    statuses: dict[int, int] = {}

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        # What is allowed may still be refused for what the model alone knows, such as a token that it lacks.
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    check()
    if mode is GenerationMode.POSITIVE and path in PATHS:
        assert statuses[200] > examples / 10, f"most was refused: {statuses}"
