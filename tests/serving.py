"""What the tests of the server have in common: engines, questions, and ways to read what is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx
import torch

import fastdllm_ext as fd
from fastdllm_ext.demo_tasks import held_out
from fastdllm_ext.serve.app import create_app
from fastdllm_ext.serve.gate import Access
from fastdllm_ext.serve.remote import RemoteEngine
from fastdllm_ext.serve.service import Limits, Service

Json = dict[str, Any]
PROMPTS = [problem.prompt for problem in held_out(6)]
PATHS = ("/v1/completions", "/v1/chat/completions")


def demo() -> tuple[Any, Any]:
    """A demo model of one's own: while an engine is open, nothing else may run its model."""
    loaded: tuple[Any, Any] = fd.load(fd.demo_model_path(), device="cpu")
    return loaded


@cache
def reference() -> tuple[Any, Any]:
    """What the tests themselves ask."""
    return demo()


@cache
def for_steps() -> tuple[Any, Any]:
    return demo()


def served(engine: fd.Engine | RemoteEngine, limits: Limits | None = None, **arguments: Any) -> Service:
    service = Service("demo", limits or Limits(), **arguments)
    service.open(engine)
    return service


async def until(condition: Callable[[], bool]) -> None:
    """Lets others run until something is so."""

    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(wait(), 20)


def client(service: Service, access: Access | None = None, **arguments: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service, access))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", **arguments)


def ask(
    service: Service, method: str, path: str, access: Access | None = None, **arguments: Any
) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(service, access) as http:
            return await http.request(method, path, **arguments)

    return asyncio.run(asyncio.wait_for(run(), 60))


def body(path: str, prompt: str = PROMPTS[0], **fields: Any) -> Json:
    """A request of either kind."""
    if path == "/v1/completions":
        return {"model": "demo", "prompt": prompt, **fields}
    return {"model": "demo", "messages": [{"role": "user", "content": prompt}], **fields}


def post(service: Service, path: str, **fields: Any) -> httpx.Response:
    return ask(service, "POST", path, json=body(path, **fields))


def answer(service: Service, path: str, **fields: Any) -> Json:
    response = post(service, path, **fields)
    assert response.status_code == 200, response.text
    found: Json = response.json()
    return found


def events(response: httpx.Response) -> list[Json]:
    """The chunks of a stream that came to its end."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last, nothing = response.text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def texts(found: Json) -> list[str]:
    """Of a response's choices, whichever kind it is of."""
    return [
        choice["text"] if "text" in choice else choice["message"]["content"] for choice in found["choices"]
    ]


def streamed(chunks: list[Json]) -> dict[int, str]:
    """The text of each choice of a stream of blocks."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            new = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found[choice["index"]] = found.get(choice["index"], "") + new
    return found


@cache
def alone(prompts: tuple[str, ...], **fields: Any) -> tuple[list[list[int]], list[str], fd.GenerationOutput]:
    """What ``fd.generate`` answers: tokens and text."""
    model, tokenizer = reference()
    rows = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    output = fd.generate(model, rows, **fields)
    tokens = [row.tolist() for row in output.answers()]
    return tokens, [tokenizer.decode(row, skip_special_tokens=True) for row in tokens], output


def refusal(response: httpx.Response, status: int) -> Json:
    """The error of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
