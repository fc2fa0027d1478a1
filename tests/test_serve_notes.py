"""What the server says of itself: metrics, logs, its page, its description."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator

import httpx
import pytest

import fastdllm_ext as fd
from fastdllm_ext.serve.app import create_app
from fastdllm_ext.serve.gate import Access
from fastdllm_ext.serve.logs import configure
from fastdllm_ext.serve.service import Service
from serving import PATHS, answer, ask, demo, post, refusal, served, texts, until


@pytest.fixture(scope="module")
def engine() -> Iterator[fd.Engine]:
    with fd.Engine(*demo(), max_rows=16) as engine:
        yield engine


@pytest.fixture
def service(engine: fd.Engine) -> Service:
    return served(engine)


def numbers(service: Service) -> dict[str, float]:
    lines = ask(service, "GET", "/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_metrics_count() -> None:
    with fd.Engine(*demo(), max_rows=2) as engine:
        service = served(engine)
        first = answer(service, PATHS[0], n=2)
        second = answer(service, PATHS[1], stop="=", steps=44)
        post(service, PATHS[1], temperature=-1)
        ask(service, "GET", "/nothing")
        asyncio.run(until(lambda: engine.stats.cancelled == 1))  # at a turn behind the stop string
        found = numbers(service)
        stats = engine.stats
    both = (first, second)
    requests = 'fastdllm_requests_total{endpoint="%s",status="%d"}'
    assert found[requests % (PATHS[0], 200)] == 1
    assert found[requests % (PATHS[1], 200)] == 1
    assert found[requests % (PATHS[1], 400)] == 1
    assert found[requests % ("other", 404)] == 1
    assert found['fastdllm_request_seconds_count{endpoint="/v1/chat/completions"}'] == 2
    assert found["fastdllm_tokens_total"] == sum(one["usage"]["completion_tokens"] for one in both)
    assert found["fastdllm_prompt_tokens_total"] == sum(one["usage"]["prompt_tokens"] for one in both)
    assert found["fastdllm_nfe_total"] == sum(one["fastdllm"]["nfe"] for one in both)
    blocks = sum(math.ceil(n / 32) for n in (first["usage"]["completion_tokens"] / 2,) * 2)
    assert found["fastdllm_first_block_seconds_count"] == 3
    assert found["fastdllm_block_seconds_count"] == blocks - 2
    assert found["fastdllm_tokens_per_forward_count"] == 3
    assert found["fastdllm_answers_finished_total"] == 2
    assert found["fastdllm_answers_cancelled_total"] == 1
    assert found["fastdllm_forwards_total"] == stats.forwards
    assert found["fastdllm_pages"] == found["fastdllm_pages_free"] == stats.num_pages
    assert found["fastdllm_answers_running"] == found["fastdllm_answers_queued"] == 0
    assert found["fastdllm_preemptions_total"] == 0


def test_metrics_before_the_model_is_there() -> None:
    assert "fastdllm_pages" not in numbers(Service("demo"))


@pytest.mark.parametrize("texts_too", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_for_each_request(engine: fd.Engine, texts_too: bool, as_json: bool) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    configure("info", as_json, stream)
    try:
        service = served(engine, log_texts=texts_too)
        found = answer(service, PATHS[1], prompt="Add 4821 and 99.\nforged=1")
        post(service, PATHS[1], prompt="Add 4821 and 99.", temperature=5)
        ask(service, "GET", "/no%0Athing")
    finally:
        root.handlers[:], root.level = before
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert ("Add 4821" in stream.getvalue()) == texts_too
    assert (json.dumps(texts(found)[0])[1:-1] in stream.getvalue()) == texts_too
    if as_json:
        one, two, three = map(json.loads, lines)
        assert one["id"] == found["id"].removeprefix("chatcmpl-")
        assert (one["level"], one["message"], one["method"]) == ("info", "request", "POST")
        assert (one["endpoint"], one["status"]) == (PATHS[1], 200)
        assert one["tokens"] == found["usage"]["completion_tokens"]
        assert one["prompt_tokens"] == found["usage"]["prompt_tokens"]
        assert one["nfe"] == found["fastdllm"]["nfe"]
        assert one["seconds"] > 0
        assert two["status"] == 400
        assert "tokens" not in two
        assert (three["endpoint"], three["status"]) == ("other", 404)
    else:
        assert f'endpoint="{PATHS[1]}" status=200 ' in lines[0]
        assert f"tokens={found['usage']['completion_tokens']} nfe=" in lines[0]


PAGE = b"<html><style>p {}</style><script>\nlet a = 1;\n</script><script type='module'>b()</script></html>"


def test_a_page_may_run_what_is_in_it_and_nothing_else() -> None:
    async def run() -> httpx.Response:
        app = create_app(Service("demo"), Access("key", ()), PAGE)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return await http.get("/")

    response = asyncio.run(run())
    assert response.content == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(
        part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";")
    )

    def digest(text: bytes) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    script = digest(b"\nlet a = 1;\n")
    assert policy == {
        "default-src": "'none'",
        "script-src": f"{script} {digest(b'b()')}",
        "style-src": digest(b"p {}"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_without_a_page(service: Service) -> None:
    async def run() -> httpx.Response:
        app = create_app(service, page=b"")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return await http.get("/")

    refusal(asyncio.run(run()), 404)
