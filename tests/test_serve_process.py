"""The server as a process: real connections, clients of others, signals, the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.cli import main
from fastdllm_ext.commands.opening import open_engine
from fastdllm_ext.patching.registry import patched_options
from fastdllm_ext.serve import command, process
from fastdllm_ext.serve.app import create_app
from fastdllm_ext.serve.gate import Access
from fastdllm_ext.serve.process import Server, listen
from fastdllm_ext.serve.service import Service
from serving import PATHS, PROMPTS, Json, alone, body, demo

KEY = "key-of-the-test"
ENDLESS: Json = {"max_tokens": 480, "block_length": 480, "steps": 480, "cache": "none"}  # seconds


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Waits for something to be so."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
    return found


class Running:
    """A server at a port of its own, in a thread."""

    def __init__(self, open_engine: Callable[[], fd.Engine], key: str | None = None) -> None:
        self.service = Service("demo")
        self.server = Server(create_app(self.service, Access(key)), self.service, 20)
        self.listener = listen("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run, args=(open_engine,))
        self.thread.start()

    def _run(self, open_engine: Callable[[], fd.Engine]) -> None:
        self.status = self.server.leave(self.server.serve_on(self.listener, open_engine))

    @property
    def stats(self) -> Any:
        assert self.service.engine is not None
        return self.service.engine.stats


@contextmanager
def running(open_engine: Callable[[], fd.Engine], key: str | None = None) -> Iterator[Running]:
    found = Running(open_engine, key)
    try:
        yield found
    finally:
        found.server.should_exit = True
        found.thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(lambda: fd.Engine(*demo(), max_rows=8), KEY) as found:
        until(lambda: found.service.status == "ok")
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


USER: Any = [{"role": "user", "content": PROMPTS[0]}]


# OpenAI's client


def test_openai_s_client_gets_answers(client: openai.OpenAI) -> None:
    (tokens,), (text,), _ = alone((PROMPTS[0],))
    chat = client.chat.completions.create(model="demo", messages=USER)
    assert chat.choices[0].message.content == text
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == len(tokens)
    assert chat._request_id == chat.id.removeprefix("chatcmpl-")
    completion = client.completions.create(model="demo", prompt=list(PROMPTS[:2]), max_tokens=128)
    assert [choice.text for choice in completion.choices] == alone(tuple(PROMPTS[:2]))[1]
    again = client.chat.completions.create(
        model="demo", messages=[*USER, chat.choices[0].message, {"role": "user", "content": PROMPTS[1]}]
    )
    assert again.choices[0].message.content == alone((PROMPTS[1],))[1][0], "its own message, given back"


def test_openai_s_client_streams(client: openai.OpenAI) -> None:
    (tokens,), (text,), _ = alone((PROMPTS[0],))
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokens)
    parts = client.completions.create(model="demo", prompt=PROMPTS[0], stream=True)
    assert "".join(part.choices[0].text for part in parts) == text
    with client.chat.completions.stream(model="demo", messages=USER) as stream:
        assert stream.get_final_completion().choices[0].message.content == text


def test_openai_s_client_asks_for_more(client: openai.OpenAI) -> None:
    _, (text,), output = alone((PROMPTS[0],))
    chat = client.chat.completions.create(
        model="demo", messages=USER, n=2, stop=["=", "Sum"], temperature=0, seed=1, logprobs=True
    )
    for choice in chat.choices:
        assert choice.message.content == text[: text.index("=")]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        found = [entry.logprob for entry in choice.logprobs.content]
        wanted = output.confidence[0, : len(found)].log().tolist()
        assert found == pytest.approx(wanted, abs=1e-4)
    completion = client.completions.create(
        model="demo", prompt=PROMPTS[0], logprobs=0, extra_body={"steps": 64, "cache": "prefix"}
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == completion.choices[0].text
    assert completion.model_extra is not None
    assert completion.model_extra["fastdllm"]["nfe"] == int(
        alone((PROMPTS[0],), steps=64, cache="prefix")[2].nfe
    )


def test_openai_s_asynchronous_client(server: Running) -> None:
    texts = alone(tuple(PROMPTS))[1]

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def whole(prompt: str) -> str:
                return (await client.completions.create(model="demo", prompt=prompt)).choices[0].text

            async def parts(prompt: str) -> str:
                messages: Any = [{"role": "user", "content": prompt}]
                stream = await client.chat.completions.create(model="demo", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            found = await asyncio.gather(*map(whole, PROMPTS), *map(parts, PROMPTS))
            assert found == [*texts, *texts]
            assert [model.id async for model in client.models.list()] == ["demo"]

    asyncio.run(run())


def test_openai_s_client_reads_errors(client: openai.OpenAI, server: Running) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="takes a number from 0 to 2") as refused:
        create(model="demo", messages=USER, temperature=3)
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.APIStatusError) as long:
        create(model="demo", messages=USER, max_tokens=10**6)
    assert (long.value.status_code, long.value.code) == (413, "context_length_exceeded")
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="wrong API key"):
        other.models.list()


def test_openai_s_client_is_told_when_to_come_back() -> None:
    """While the model is loaded, and when the queue is full."""
    may_load = threading.Event()

    def open_engine() -> fd.Engine:
        assert may_load.wait(60)
        return fd.Engine(*demo(), max_rows=1, max_queue=0)

    with running(open_engine) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        create: Any = client.chat.completions.create
        for ask in (client.models.list, lambda: create(model="demo", messages=USER)):
            with pytest.raises(openai.InternalServerError, match="being loaded") as early:
                ask()
            assert early.value.status_code == 503
            assert early.value.response.headers["retry-after"] == "5"
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        may_load.set()
        until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        with pytest.raises(openai.RateLimitError) as full:
            create(model="demo", messages=USER)
        assert full.value.response.headers["retry-after"] == "1"


# Connections


def raw(server: Running, content: bytes) -> socket.socket:
    """A connection on which a request was sent."""
    found = socket.create_connection(server.address, timeout=60)
    head = (
        f"POST {PATHS[0]} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    found.sendall(head.encode() + content)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(server: Running, stream: bool) -> None:
    before = server.stats
    connection = raw(server, json.dumps(body(PATHS[0], n=2, stream=stream, **ENDLESS)).encode())
    until(lambda: server.stats.running == 2)
    assert server.stats.free_pages < server.stats.num_pages
    connection.close()
    until(lambda: server.stats.cancelled == before.cancelled + 2)
    stats = server.stats
    assert (stats.running, stats.queued, stats.finished) == (0, 0, before.finished)
    assert stats.free_pages == stats.num_pages
    metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert f'fastdllm_requests_total{{endpoint="{PATHS[0]}",status="499"}}' in metrics


def test_a_body_that_is_too_long_for_a_connection(server: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    refused = httpx.post(f"{server.url}{PATHS[0]}", content=b" " * (5 << 20), headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_long")
    assert refused.headers["connection"] == "close"


def test_what_is_no_http_changes_nothing(server: Running, client: openai.OpenAI) -> None:
    for content in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Le",
    ):
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(content)
    with raw(server, b'{"model": "demo", "prom') as connection:
        connection.sendall(b"")
    assert client.models.list().data[0].id == "demo"
    assert server.stats.queued == 0


def test_answers_are_sent_without_delay(server: Running) -> None:
    with httpx.Client() as http:
        http.get(f"{server.url}/health")
        sockets = [one.transport.get_extra_info("socket") for one in server.server.server_state.connections]
        assert sockets
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


# Its end


def test_a_signal_while_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    may_load, ended = threading.Event(), []
    monkeypatch.setattr(process, "_exit", ended.append)

    def open_engine() -> fd.Engine:
        may_load.wait(60)
        raise ValueError("too late")

    with running(open_engine) as server:
        until(lambda: server.server.started)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(60)
        assert ended == [0]
        may_load.set()


def test_the_first_signal_waits_for_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lambda: fd.Engine(*demo(), max_rows=1)) as server:
        ticks, on_tick = [], server.server.on_tick

        async def counted(counter: int) -> bool:
            ticks.append(counter)
            return await on_tick(counter)

        monkeypatch.setattr(server.server, "on_tick", counted)
        until(lambda: server.service.status == "ok")
        connection = raw(server, json.dumps(body(PATHS[0], **ENDLESS)).encode())
        until(lambda: server.stats.running == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.service.status == "draining")
        before = len(ticks)
        until(lambda: len(ticks) >= before + 4, seconds=5)
        assert server.stats.running == 1
        connection.close()  # which ends its request, and so the server
        server.thread.join(60)
        assert server.status == 0


def lines(process: subprocess.Popen[str]) -> Iterator[Json]:
    assert process.stderr is not None
    for line in process.stderr:
        yield json.loads(line)


def started(*arguments: str) -> tuple[subprocess.Popen[str], str, Iterator[Json]]:
    """The command, the address that it says it listens at, and what it logs from there on."""
    command_line = [sys.executable, "-m", "fastdllm_ext", "serve", "--port", "0", "--log-json", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTDLLM_API_KEY": KEY}
    found = subprocess.Popen(command_line, env=environment, stderr=subprocess.PIPE, text=True)
    log = lines(found)
    words = next(log)["message"]
    assert words.startswith("listening on http://127.0.0.1:")
    return found, words.removeprefix("listening on "), log


def asked(url: str, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}{PATHS[0]}", json=body(PATHS[0], **fields), headers=headers, timeout=120)


def test_a_signal_drains_and_ends_with_status_0() -> None:
    server, url, log = started("--shutdown-timeout", "60")
    with server, ThreadPoolExecutor(1) as others:
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        fields: Json = {"max_tokens": 128, "block_length": 128, "steps": 128, "cache": "none"}
        running = others.submit(asked, url, **fields)
        until(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
        refused = asked(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert (
            running.result().json()["choices"][0]["text"]
            == alone((PROMPTS[0],), steps=128, block_length=128, cache="none")[1][0]
        )
        assert server.wait(60) == 0
        entries = list(log)
    words = [entry["message"] for entry in entries]
    assert words.index("serving demo") < words.index("shutting down")
    assert [(e["status"], e["tokens"] > 0) for e in entries if "tokens" in e] == [(200, True)]


def test_a_second_signal_ends_at_once() -> None:
    server, url, _ = started("--shutdown-timeout", "60")
    with server, ThreadPoolExecutor(1) as others:
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        running = others.submit(asked, url, **ENDLESS)
        until(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
        server.send_signal(signal.SIGINT)
        until(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 128 + signal.SIGINT
        with pytest.raises(httpx.HTTPError):
            running.result()


# The command line


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets up the whole process's logging, which is the tests' here."""
    monkeypatch.setattr("fastdllm_ext.serve.logs.configure", lambda level, as_json: None)
    monkeypatch.delenv("FASTDLLM_API_KEY", raising=False)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--port", "65536"], "--port=65536; takes 0 to 65535"),
        (["--max-rows", "0"], "--max-rows=0; takes 1 or more"),
        (["--max-queue", "0"], "--max-queue=0; takes 1 or more"),
        (["--max-n", "0"], "--max-n=0"),
        (["--max-body-bytes", "0"], "--max-body-bytes=0"),
        (["--num-pages", "0"], "--num-pages=0"),
        (["--request-timeout", "0"], "--request-timeout=0.0; takes a number above 0"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout=nan"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "a b"], "--api-key"),
        (["--host", "192.0.2.1"], "--host=192.0.2.1 --port=8000: "),
    ],
)
def test_arguments_out_of_range(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *argv]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("fastdllm-ext serve: ")
    assert words in complaint
    assert complaint.count("\n") == 1


@pytest.mark.usefixtures("quiet")
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'fastdllm_ext[serve]'\n")


def test_the_package_imports_no_web_framework() -> None:
    code = (
        "import sys, fastdllm_ext.cli, fastdllm_ext.serve.command\n"
        "print([name for name in ('fastapi', 'uvicorn', 'prometheus_client') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("quiet")
def test_a_model_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["Bert"]}')
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "model_type='bert' with architectures=['Bert'] is not supported" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("quiet")
def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"--host=127.0.0.1 --port={port}: " in capsys.readouterr().err


def test_the_api_key_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDLLM_API_KEY", "from-outside")
    assert command._checked(arguments()) == "from-outside"
    assert command._checked(arguments("--api-key", "given")) == "given"
    monkeypatch.delenv("FASTDLLM_API_KEY")
    assert command._checked(arguments()) is None


def test_the_name_of_a_model(tmp_path: Path) -> None:
    assert command._name(arguments()) == "demo"
    assert command._name(arguments("GSAI-ML/LLaDA-8B-Instruct")) == "GSAI-ML/LLaDA-8B-Instruct"
    assert command._name(arguments(f"{tmp_path}/")) == tmp_path.name
    assert command._name(arguments(str(tmp_path), "--served-model-name", "mine")) == "mine"


@pytest.mark.usefixtures("quiet")
def test_which_hosts_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Access] = []

    def serve_on(server: Server, listener: socket.socket, open_engine: Callable[[], fd.Engine]) -> int:
        listener.close()
        return 0

    def noting(service: Service, access: Access) -> Any:
        seen.append(access)
        return create_app(service, access)

    monkeypatch.setattr(Server, "serve_on", serve_on)
    monkeypatch.setattr("fastdllm_ext.serve.app.create_app", noting)
    for argv, hosts in (
        ([], {"127.0.0.1"}),
        (["--allowed-host", "box", "--allowed-host", "Box.lan"], {"127.0.0.1", "box", "box.lan"}),
        (["--api-key", "key"], None),
        (["--host", "0.0.0.0"], None),
        (["--host", "0.0.0.0", "--allowed-host", "box"], {"0.0.0.0", "box"}),
    ):
        assert main(["serve", "--port", "0", *argv]) == 0
        assert seen[-1].hosts == hosts
        assert seen[-1].key == (b"key" if "--api-key" in argv else None)


@pytest.mark.usefixtures("quiet")
def test_options_reach_the_model_and_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd.GenerationConfig(steps=24, gen_length=48).save_pretrained(tmp_path)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--runtime", "modules", "--kv-cache-dtype", "fp8"]
    limits = ["--num-pages", "7", "--max-rows", "3", "--max-queue", "5", "--port", "0"]
    opened: list[fd.Engine] = []

    def serve_on(server: Server, listener: socket.socket, open_engine: Callable[[], fd.Engine]) -> int:
        listener.close()
        opened.append(open_engine())
        return 0

    monkeypatch.setattr(Server, "serve_on", serve_on)
    assert main(["serve", *options, *limits, "--generation-config", str(tmp_path), "--cache", "prefix"]) == 0
    with opened[0] as engine:
        assert next(engine.model.parameters()).dtype is torch.bfloat16
        assert (patched_options(engine.model).runtime, engine.cache.dtype) == ("modules", torch.float8_e4m3fn)
        assert engine.longest == 7 * 32
        assert (engine.max_rows, engine.max_queue) == (3, 5)
        assert (engine.config.steps, engine.config.gen_length, engine.config.cache) == (24, 48, "prefix")


REMOTE = """
from fastdllm_ext.models import LLaDAConfig as Ours, LLaDAModelLM as OurModel
class LLaDAConfig(Ours):
    pass
class LLaDAModelLM(OurModel):
    config_class = LLaDAConfig
    remote = True
"""


def test_remote_code_runs_where_it_is_trusted_alone(tmp_path: Path) -> None:
    for file in fd.demo_model_path().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_code.LLaDAConfig", "AutoModel": "own_code.LLaDAModelLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own_code.py").write_text(REMOTE)
    for argv, remote in (([], False), (["--trust-remote-code"], True)):
        with open_engine(arguments(str(tmp_path), *argv), max_rows=1) as engine:
            assert getattr(engine.model, "remote", False) == remote
            assert engine.tokenizer is not None
            prompt = engine.tokenizer(PROMPTS[0])["input_ids"]
            assert engine.submit(prompt).result(60).text == alone((PROMPTS[0],))[1][0]
