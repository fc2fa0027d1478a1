"""What the server refuses, and how requests end that do not come to their end."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.serve.app import create_app
from fastdllm_ext.serve.gate import Access
from fastdllm_ext.serve.service import Limits, Service
from serving import (
    PATHS,
    PROMPTS,
    Json,
    alone,
    answer,
    ask,
    body,
    client,
    demo,
    events,
    for_steps,
    post,
    reference,
    refusal,
    served,
    streamed,
    texts,
    until,
)
from stepped import Stepped

SLOW: Json = {"max_tokens": 64, "block_length": 64, "steps": 64, "cache": "none"}


@pytest.fixture(scope="module")
def engine() -> Iterator[fd.Engine]:
    with fd.Engine(*demo(), max_rows=16) as engine:
        yield engine


@pytest.fixture
def service(engine: fd.Engine) -> Service:
    return served(engine)


@pytest.fixture
def stepped() -> Iterator[Stepped]:
    with Stepped(*for_steps(), max_rows=2, max_queue=3) as engine:
        yield engine


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "field, value, words",
    [
        ("temperature", 3, "takes a number from 0 to 2"),
        ("temperature", "hot", 'temperature="hot"; takes a number'),
        ("temperature", 1e-9, "temperature=1e-09; takes a number from 1e-6, or 0"),
        ("top_p", 0, "above 0 to 1"),
        ("max_tokens", 0, "takes an int from 1"),
        ("max_tokens", 5.5, "takes an int"),
        ("max_tokens", 10**400, "max_tokens=1000"),
        ("n", 0, "takes an int from 1"),
        ("n", True, "n=true; takes an int"),
        ("seed", -1, "takes an int from 0"),
        ("seed", 2**63, "takes an int from 0"),
        ("stop", ["a", "b", "c", "d", "e"], "4 at most"),
        ("stop", [""], "1 to 1000 characters"),
        ("stream", "yes", "takes true or false"),
        ("stream_options", {"usage": True}, "stream_options.usage=true"),
        ("stream_mode", "denoise", "takes stream=true"),
        ("stream_mode", "fast", '"blocks" or "denoise"'),
        ("presence_penalty", 0.5, "takes 0"),
        ("presence_penalty", False, "takes 0"),
        ("frequency_penalty", -1, "takes 0"),
        ("logit_bias", {"5": 1}, "takes {}"),
        ("store", True, "takes false"),
        ("store", 0, "takes false"),
        ("service_tier", "flex", '"auto" or "default"'),
        ("threshold", 2, "takes a number from"),
        ("threshold", -0.5, "threshold=-0.5; takes a number above 0"),
        ("factor", 0, "above 0"),
        ("steps", 0, "takes an int from 1"),
        ("rule", "fastest", "rule='fastest'; takes one of"),
        ("rule", "klass:kl=-1", "kl=-1; takes"),
        ("rule", {"name": "klass", "speed": 1}, "unknown parameter 'speed'"),
        ("rule", ["klass"], "takes a string"),
        ("cache", "full", '"none" or "prefix" or "dual"'),
        ("refresh", "always", '"block" or an int from 1'),
        ("block_length", -3, "takes an int from 1"),
        ("remasking", "luck", '"low_confidence" or'),
        ("remasking", "entropy", "takes a threshold"),
        ("cfg_scale", -1, "takes a number from 0"),
        ("best", 1, 'unknown field "best"; takes '),
        ("model", None, "model=null; takes a string"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    service: Service, path: str, field: str, value: object, words: str
) -> None:
    error = refusal(post(service, path, **{field: value}), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert words in error["message"]
    assert field in error["message"]


@pytest.mark.parametrize(
    "path, fields, param, words",
    [
        (0, {"prompt": 5}, "prompt", "prompt=5; takes a string or [a string, ...]"),
        (0, {"prompt": []}, "prompt", "prompt=[]"),
        (0, {"prompt": [1, "a"]}, "prompt", 'prompt=[1, "a"]'),
        (0, {"prompt": [[]]}, "prompt", "prompt=[[]]"),
        (0, {"prompt": [188]}, "prompt", "prompt[0] holds token 188; takes 0 to 187"),
        (0, {"prompt": [0]}, "prompt", "mask token 0"),
        (0, {"suffix": "b"}, "suffix", "takes null"),
        (0, {"best_of": 3}, "best_of", "best_of=3; takes 1 or n=1"),
        (0, {"logprobs": 6}, "logprobs", "from 0 to 5"),
        (0, {"logprobs": True}, "logprobs", "takes an int"),
        (0, {"logprobs": 0, "remasking": "margin"}, "logprobs", "'margin' ranks by what is no probability"),
        (0, {"logprobs": 0, "echo": True}, "echo", "takes false with logprobs"),
        (0, {"messages": []}, "messages", "unknown field"),
        (1, {"messages": []}, "messages", "messages=[]"),
        (1, {"messages": [{"role": "tool", "content": "a"}]}, "messages", 'messages[0].role="tool"'),
        (1, {"messages": [{"role": "user"}]}, "messages", "messages[0].content is missing"),
        (1, {"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages", "messages[0].mood=1"),
        (
            1,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
            "messages",
            'messages[0].content[0].type="image_url"',
        ),
        (1, {"tools": [{"type": "function"}]}, "tools", "takes []"),
        (1, {"tool_choice": "required"}, "tool_choice", '"none" or "auto"'),
        (1, {"response_format": {"type": "json_object"}}, "response_format", "response_format.type"),
        (1, {"reasoning_effort": "high"}, "reasoning_effort", "takes null"),
        (1, {"top_logprobs": 2, "logprobs": True}, "top_logprobs", "takes 0"),
        (1, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "another name"),
        (1, {"logprobs": True, "remasking": "random"}, "logprobs", "'random'"),
        (1, {"steps": 3, "threshold": 0.5}, "steps", "takes only one of"),
        (1, {"n": 129}, "n", "takes 128 at most"),
    ],
)
def test_what_each_endpoint_refuses(
    service: Service, path: int, fields: Json, param: str, words: str
) -> None:
    error = refusal(ask(service, "POST", PATHS[path], json=body(PATHS[path]) | fields), 400)
    assert error["param"] == param
    assert words in error["message"]


def test_a_number_without_a_fraction_is_whole(service: Service) -> None:
    found = answer(service, PATHS[0], max_tokens=8.0, steps=4.0, seed=1.0)
    assert (found["usage"]["completion_tokens"], found["fastdllm"]["nfe"]) == (8, 4)


def test_openai_s_other_fields_are_taken_where_they_change_nothing(service: Service) -> None:
    neutral: Json = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "metadata": {"a": "b"},
        "store": False, "service_tier": "auto", "user": "ada", "n": 1, "stop": None, "stream": False,
        "stream_options": None, "temperature": 0, "top_p": 1, "seed": None, "stream_mode": "blocks",
    }  # fmt: skip
    of_each: tuple[Json, Json] = (
        {"best_of": 1, "suffix": None, "echo": False, "logprobs": None},
        {
            "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "reasoning_effort": None,
            "response_format": {"type": "text"}, "logprobs": False, "top_logprobs": 0, "modalities": ["text"],
        },
    )  # fmt: skip
    _, (text,), _ = alone((PROMPTS[0],))
    for path, more in zip(PATHS, of_each, strict=True):
        assert texts(answer(service, path, **neutral, **more)) == [text]
        assert texts(answer(service, path, **dict.fromkeys({**neutral, **more}))) == [text], (
            "null is the default"
        )
    assert len(texts(answer(service, PATHS[0], best_of=2, n=2))) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"5", b'{"model": "demo", "prompt": "a", "temperature": NaN}',
        b'{"model": "demo", "prompt": "a", "temperature": Infinity}',
        b'{"model": "demo", "prompt": "a", "temperature": 1e999}',
        b'{"model": "demo", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "demo", "prompt": ' + b"[" * 100000 + b"}",
        b'{"model": "demo", "prompt": "\\ud800"}', b'{"model": "demo", "prompt": "\xff"}',
        b'{"model": "demo", "prompt": "\xed\xa0\x80"}', b'{"model": "demo", "prompt": "a"} more',
        b"\xef\xbb\xbf{}", b"\x00", '{"model": "demo", "prompt": "a"}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object(service: Service, content: bytes) -> None:
    response = ask(service, "POST", PATHS[0], content=content, headers={"Content-Type": "application/json"})
    error = refusal(response, 400)
    assert error["message"].startswith(("body: ", "temperature="))


def test_the_content_type(service: Service) -> None:
    content = json.dumps(body(PATHS[0])).encode()
    for kind, status in (
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
    ):
        response = ask(service, "POST", PATHS[0], content=content, headers={"Content-Type": kind})
        assert response.status_code == status
    assert "takes application/json" in refusal(response, 400)["message"]
    assert ask(service, "POST", PATHS[0], content=content).status_code == 400


def test_a_body_that_is_too_long_is_not_read_to_its_end(engine: fd.Engine) -> None:
    service, read = served(engine, Limits(body_bytes=1000)), []

    async def parts() -> Any:
        for _ in range(1000):
            read.append(100)
            yield b" " * 100

    headers = {"Content-Type": "application/json"}
    error = refusal(ask(service, "POST", PATHS[0], content=parts(), headers=headers), 413)
    assert (error["code"], "takes 1000" in error["message"]) == ("body_too_long", True)
    assert sum(read) <= 1200
    fits = json.dumps(body(PATHS[0])).encode().ljust(1000)
    assert ask(service, "POST", PATHS[0], content=fits, headers=headers).status_code == 200
    assert ask(service, "POST", PATHS[0], content=fits + b" ", headers=headers).status_code == 413


def test_other_models_paths_and_methods(service: Service) -> None:
    for path in PATHS:
        error = refusal(post(service, path, model="gpt"), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'gpt'" in error["message"]
        response = ask(service, "GET", path)
        assert response.headers["allow"] == "POST"
        refusal(response, 405)
    assert refusal(ask(service, "GET", "/v1/models/gpt"), 404)["code"] == "model_not_found"
    for path in ("/nothing", "/v1/models/", "/v1", "/docs", "/v1/completions/"):
        refusal(ask(service, "GET", path), 404)
    refusal(ask(service, "DELETE", "/health"), 405)


def test_the_model_s_card(service: Service, engine: fd.Engine) -> None:
    found = ask(service, "GET", "/v1/models").json()
    assert found["object"] == "list"
    (card,) = found["data"]
    assert card == ask(service, "GET", "/v1/models/demo").json()
    assert (card["id"], card["object"], card["owned_by"]) == ("demo", "model", "fastdllm_ext")
    assert card["fastdllm"] == {
        "max_positions": 512,
        "max_tokens_default": 128,
        "family": "llada",
        "settings": {},
        "takes_top_p": False,
        "has_chat": True,
        "parameters": sum(weight.numel() for weight in reference()[0].parameters()),
    }


def test_a_name_with_a_slash(engine: fd.Engine) -> None:
    service = Service("GSAI-ML/LLaDA")
    service.open(engine)
    assert ask(service, "GET", "/v1/models/GSAI-ML/LLaDA").json()["id"] == "GSAI-ML/LLaDA"
    assert ask(service, "GET", "/v1/models/GSAI-ML%2FLLaDA").json()["id"] == "GSAI-ML/LLaDA"


def test_health_says_how_the_server_stands(service: Service) -> None:
    loading = Service("demo")
    response = ask(loading, "GET", "/health")
    assert (response.status_code, response.json()) == (503, {"status": "loading"})
    response = ask(service, "GET", "/health")
    pages = {"free_pages": service.engine.stats.num_pages, "num_pages": service.engine.stats.num_pages}
    assert (response.status_code, response.json()) == (
        200,
        {"status": "ok", "queued": 0, "running": 0, **pages},
    )
    service.status = "draining"
    assert ask(service, "GET", "/health").json()["status"] == "draining"


@pytest.mark.parametrize("status", ["loading", "draining", "failed"])
def test_while_requests_are_not_taken(engine: fd.Engine, status: Any) -> None:
    service = served(engine)
    service.status = status
    for method, path in (
        ("POST", PATHS[0]),
        ("POST", PATHS[1]),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/demo"),
    ):
        response = ask(service, method, path, json=body(path) if method == "POST" else None)
        assert refusal(response, 503)["code"] == status
        assert int(response.headers["retry-after"]) > 0
        assert (response.headers.get("connection") == "close") == (status == "draining")
    assert ask(service, "GET", "/metrics").status_code == 200


def test_an_engine_that_has_failed_is_told_by_health(monkeypatch: pytest.MonkeyPatch) -> None:
    with fd.Engine(*demo(), num_pages=8) as broken:
        service = served(broken)
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(broken._scheduler, "turn", lambda: 1 / 0)
        assert refusal(post(service, PATHS[0]), 500)["code"] is None
        response = ask(service, "GET", "/health")
        assert (response.status_code, response.json()["status"]) == (503, "failed")
        assert refusal(post(service, PATHS[0]), 503)["code"] == "failed"


def test_a_model_that_is_loaded_too_late_does_not_open_the_server(engine: fd.Engine) -> None:
    service = Service("demo")
    service.status = "draining"
    service.open(engine)
    assert service.status == "draining"


def test_a_key() -> None:
    service = Service("demo")
    access = Access("secret-key")

    def status(path: str, header: str | None) -> int:
        headers = {} if header is None else {"Authorization": header}
        return ask(service, "GET", path, access, headers=headers).status_code

    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        for header in (
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer secret",
            "Bearer secret-key2",
            "Basic secret-key",
            "secret-key",
        ):
            assert status(path, header) == 401, (path, header)
    assert status("/metrics", "Bearer secret-key") == 200
    assert status("/metrics", "bearer  secret-key") == 200
    assert status("/v1/models", "Bearer secret-key") == 503
    assert status("/health", None) == 503
    response = ask(service, "POST", PATHS[0], access, content=b"")
    assert response.headers["www-authenticate"] == "Bearer"
    assert refusal(response, 401)["type"] == "authentication_error"
    assert "secret" not in response.text


def test_names_of_other_machines() -> None:
    service = Service("demo")
    for hosts, host, status in (
        ((), "127.0.0.1:8000", 503),
        ((), "localhost", 503),
        ((), "LOCALHOST:80", 503),
        ((), "127.0.0.2", 503),
        ((), "[::1]:8000", 503),
        ((), "evil.example", 403),
        ((), "localhost.evil.example", 403),
        ((), "localhost@evil.example", 403),
        ((), "evil.example@localhost", 403),
        ((), "192.168.0.7", 403),
        ((), "", 403),
        (("box.lan",), "Box.lan:8000", 503),
        (("box.lan",), "lan", 403),
        (None, "evil.example", 503),
    ):
        access = Access(None, hosts)
        response = ask(service, "GET", "/health", access, headers={"Host": host})
        assert response.status_code == status, (hosts, host)
    assert (
        refusal(ask(service, "GET", "/health", Access(None, ()), headers={"Host": "x"}), 403)["code"]
        == "host"
    )


def test_a_full_queue(stepped: Stepped) -> None:
    async def run() -> list[httpx.Response]:
        async with client(served(stepped)) as http:
            waiting = asyncio.create_task(http.post(PATHS[0], json=body(PATHS[0], n=2)))
            await until(lambda: stepped.stats.queued == 2)
            refused = [
                await http.post(PATHS[1], json=body(PATHS[1], n=2, stream=stream)) for stream in (False, True)
            ]
            stepped.turn()
            stats = stepped.stats
            assert (stats.cancelled, stats.running, stats.queued) == (1, 2, 0), "its place was given back"
            while not waiting.done():
                stepped.turn()
                await asyncio.sleep(0)
            return [*refused, await waiting]

    *refused, waited = asyncio.run(run())
    for response in refused:
        error = refusal(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert int(response.headers["retry-after"]) > 0
    assert len(texts(waited.json())) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stepped: Stepped, stream: bool) -> None:
    service = served(stepped, Limits(seconds=0.02))
    response = post(service, PATHS[0], stream=stream)
    if stream:
        assert response.status_code == 200
        last = response.text.split("\n\n")[-2]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        error = refusal(response, 504)
    assert (error["code"], error["message"]) == ("timeout", "not answered within 0.02 s")
    stepped.turn()
    assert (stepped.stats.cancelled, stepped.stats.queued) == (1, 0)
    assert not service.jobs


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(stepped: Stepped, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its pages are free at the next turn."""
    service = served(stepped)
    content = json.dumps(body(PATHS[0], stream=stream, n=2, **SLOW)).encode()
    left, sent = asyncio.Event(), []

    async def receive() -> Json:
        if not sent:
            sent.append({})
            return {"type": "http.request", "body": content}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        scope: Json = {
            "type": "http", "method": "POST", "path": PATHS[0], "raw_path": PATHS[0].encode(),
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "root_path": "",
            "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        asked = asyncio.create_task(create_app(service)(scope, receive, send))
        await until(lambda: stepped.stats.queued == 2)
        stepped.turn()
        stats = stepped.stats
        assert stats.running == 2
        assert stats.free_pages < stats.num_pages
        left.set()
        await asyncio.wait_for(asked, 20)

    with caplog.at_level(logging.INFO, "fastdllm_ext.serve"):
        asyncio.run(run())
    stepped.turn()
    stats = stepped.stats
    assert (stats.running, stats.cancelled) == (0, 2)
    assert stats.free_pages == stats.num_pages
    assert [record.facts["status"] for record in caplog.records] == [499]  # type: ignore[attr-defined]
    assert not service.jobs


@pytest.mark.parametrize("stream", [False, True])
def test_draining_waits_and_then_gives_up(stepped: Stepped, stream: bool) -> None:
    async def run(seconds: float) -> httpx.Response:
        service = served(stepped)
        async with client(service) as http:
            asked = asyncio.create_task(http.post(PATHS[0], json=body(PATHS[0], stream=stream)))
            await until(lambda: stepped.stats.queued == 1)
            draining = asyncio.create_task(service.drain(seconds))
            await until(lambda: service.status == "draining")
            assert (await http.post(PATHS[0], json=body(PATHS[0]))).status_code == 503
            assert not draining.done()
            while seconds > 1 and not asked.done():
                stepped.turn()
                await asyncio.sleep(0)
            await draining
            return await asked

    finished = asyncio.run(asyncio.wait_for(run(600), 60))
    assert finished.status_code == 200
    _, (text,), _ = alone((PROMPTS[0],))
    assert (streamed(events(finished))[0] if stream else texts(finished.json())[0]) == text
    given_up = asyncio.run(asyncio.wait_for(run(0.01), 60))
    last = given_up.text.split("data: ")[-1]
    assert json.loads(last)["error"]["code"] == "draining"
    assert given_up.status_code == (200 if stream else 503)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_not_shown(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = demo()
    with torch.no_grad():
        model.model.transformer.ln_f.weight.fill_(math.nan)
    with fd.Engine(model, tokenizer, max_rows=1) as engine:
        response = post(served(engine), PATHS[0], stream=stream)
    last = json.loads(response.text.split("data: ")[-1])
    assert response.status_code == (200 if stream else 500)
    assert last["error"]["message"] == "internal error; the server's log has more"
    assert last["error"]["type"] == "server_error"
    assert any("NaN" in str(record.exc_info) for record in caplog.records if record.exc_info)


def test_a_fault_in_the_server_is_not_shown(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.speech.encode = lambda text, special: 1 / 0  # type: ignore[method-assign, return-value, assignment]
    error = refusal(post(service, PATHS[0]), 500)
    assert "zero" not in error["message"]
    assert any("ZeroDivisionError" in str(record.exc_info) for record in caplog.records)
