"""The server over replicas on a Ray cluster, and what stands in it for their engines."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import fastdllm_ext as fd
from fastdllm_ext.cli import main
from fastdllm_ext.commands.cluster import NEEDS, cluster
from fastdllm_ext.engine import EngineClosed, EngineStats, QueueFull, Request, RequestTooLong, Update
from fastdllm_ext.serve import command, remote, replicas
from fastdllm_ext.serve.remote import Facts, Question, RemoteEngine, Word
from fastdllm_ext.serve.service import Service
from serving import PATHS, PROMPTS, Json, answer, ask, body, demo, post, refusal, served, texts
from test_serve_process import ENDLESS, KEY, USER, Running, asked, raw, running, started, until

VAGUE = "Add 4821 and 99."  # to which sampled answers differ
HEADERS = {"Authorization": f"Bearer {KEY}"}
OF_TIME = ("id", "created", "seconds", "queue_seconds", "first_block_seconds", "tokens_per_second")
SAMPLED: Json = {"temperature": 1.0, "seed": 7}
with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


# What needs no cluster: a replica is an engine of this process, which is lost as a test wants.


@pytest.fixture(scope="module")
def engine() -> Iterator[fd.Engine]:
    with fd.Engine(*demo(), max_rows=4) as engine:
        yield engine


class Lost(Exception):
    """A replica is gone."""


class Ways:
    """To one engine, of which the first ones are lost.

    Args:
        engine: behind all of them.
        losses: after how many words each of the first is lost.
        change: what a later attempt makes of its words.
    """

    def __init__(
        self, engine: fd.Engine, losses: Sequence[int] = (), change: Callable[[Word], Word] | None = None
    ) -> None:
        self.engine, self.losses, self.change = engine, list(losses), change
        self.asked: list[Question] = []
        self.alive: dict[str, EngineStats] = {"one": EngineStats()}
        self.closed = 0

    async def ask(self, question: Question) -> AsyncGenerator[Word, None]:
        self.asked.append(question)
        left = self.losses.pop(0) if self.losses else -1
        request = self.engine.submit(**vars(question))
        try:
            async for update in request:
                if left == 0:
                    raise Lost("gone")
                left -= 1
                again = self.change if len(self.asked) > 1 else None
                yield again(update) if again else update
            if left == 0:
                raise Lost("gone")
            yield request.result()
        finally:
            self.closed += 1
            request.cancel()

    async def look(self) -> Mapping[str, EngineStats]:
        return dict(self.alive)


@contextmanager
def remotely(ways: Ways, **arguments: Any) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(Facts.of(ways.engine), ways.engine.tokenizer, ways.ask, ways.look, **arguments)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pauses between attempts."""
    monkeypatch.setattr(remote, "PAUSE", 0.0)


def whole(updates: list[Update]) -> list[tuple[int, int]]:
    """Tokens and steps of all updates. (A confidence's last bits depend on who shares a forward.)"""
    return [pair for update in updates for pair in zip(update.tokens, update.steps, strict=True)]


def committed(updates: list[Update]) -> list[tuple[int, list[int], list[int]]]:
    """Steps, positions and tokens of all updates."""
    return [(one.step, one.positions, one.tokens) for update in updates for one in update.commits]


def same(request: Request, alone: Request) -> None:
    """A request's end is that of another one."""
    found, wanted = request.result(60), alone.result(60)
    for name in ("prompt_length", "tokens", "steps", "finish_reason", "nfe", "text"):
        assert getattr(found, name) == getattr(wanted, name)
    assert found.confidence == pytest.approx(wanted.confidence, abs=1e-4)
    assert 0 <= found.queue_seconds <= found.first_block_seconds <= found.seconds


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("losses", [[], [0], [1], [2], [3], [2, 0, 1, 3]])
@pytest.mark.parametrize("fields", [{}, SAMPLED, {"cache": "prefix"}, {"steps": 32, **SAMPLED}])
def test_what_is_lost_is_decoded_again(engine: fd.Engine, losses: list[int], fields: Json) -> None:
    ids, ways = engine.encode(VAGUE), Ways(engine, losses)
    fields = {"block_length": 8, "gen_length": 64, **fields}
    alone = engine.submit(ids, **fields)
    with remotely(ways) as away:
        request = away.submit(ids, **fields)
        updates = list(request)
        assert whole(updates) == whole(list(alone))
        same(request, alone)
    assert all(update.tokens for update in updates), "nothing is told twice"
    assert [update.seconds for update in updates] == sorted(update.seconds for update in updates)
    assert len(ways.asked) == ways.closed == len(losses) + 1


@pytest.mark.usefixtures("at_once")
def test_without_a_seed_all_attempts_have_the_same(engine: fd.Engine) -> None:
    ids, ways = engine.encode(VAGUE), Ways(engine, [2, 1])
    with remotely(ways) as away:
        first = away.submit(ids, temperature=1.0)
        updates = list(first)
        second = away.submit(ids, temperature=1.0)
        second.result(60)
    assert len({question.config.seed for question in ways.asked[:3]}) == 1
    assert ways.asked[3].config.seed != ways.asked[0].config.seed
    alone = engine.submit(ids, temperature=1.0, seed=ways.asked[0].config.seed)
    assert whole(updates) == whole(list(alone))


@pytest.mark.usefixtures("at_once")
def test_commits_that_come_again_are_announced(engine: fd.Engine) -> None:
    ids = engine.encode(VAGUE)
    alone = list(engine.submit(ids, every_commit=True, block_length=8))
    with remotely(Ways(engine, [4])) as away:
        updates = list(away.submit(ids, every_commit=True, block_length=8))
    restart = updates[4]
    assert (restart.restarted_at, restart.tokens, restart.commits) == (0, (), ())
    assert committed(updates[:4]) == committed(alone[:4])
    assert committed(updates[5:]) == committed(alone)
    assert whole(updates) == whole(alone)
    with remotely(Ways(engine, [0])) as away:
        updates = list(away.submit(ids, every_commit=True))
    assert all(update.restarted_at is None for update in updates), "nothing was told before"


@pytest.mark.usefixtures("at_once")
def test_attempts_have_a_bound(engine: fd.Engine) -> None:
    ways = Ways(engine, [1] * 99)
    with remotely(ways) as away:
        with pytest.raises(Lost):
            away.submit(engine.encode(VAGUE)).result(60)
        assert len(ways.asked) == ways.closed == remote.ATTEMPTS


@pytest.mark.usefixtures("at_once")
def test_an_answer_that_comes_out_otherwise_is_an_error(engine: fd.Engine) -> None:
    def other(word: Word) -> Word:
        assert isinstance(word, Update)
        return replace(word, tokens=(*word.tokens[:-1], 5))

    ways = Ways(engine, [1], other)
    with remotely(ways) as away, pytest.raises(RuntimeError, match="came out otherwise"):
        away.submit(engine.encode(VAGUE), block_length=8).result(60)
    assert len(ways.asked) == 2


def test_an_error_of_the_request_s_own_is_its_end(engine: fd.Engine) -> None:
    class Bad(Ways):
        async def ask(self, question: Question) -> AsyncGenerator[Word, None]:
            self.asked.append(question)
            yield ValueError("NaN logits")

    ways = Bad(engine)
    with remotely(ways) as away, pytest.raises(ValueError, match="NaN logits"):
        away.submit(engine.encode(VAGUE)).result(60)
    assert len(ways.asked) == 1


def test_what_is_refused_is_not_asked(engine: fd.Engine) -> None:
    ids, ways = engine.encode(VAGUE), Ways(engine)
    for kind, prompt, fields in (
        (RequestTooLong, ids, {"gen_length": 10**6}),
        (ValueError, ids, {"threshold": 2.0}),
        (ValueError, [10**6], {}),
        (TypeError, ["a"], {}),
        (TypeError, ids, {"nonsense": 1}),
    ):
        with remotely(ways) as away, pytest.raises(kind) as found:
            away.submit(prompt, **fields)
        with pytest.raises(kind) as wanted:
            engine.submit(prompt, **fields)
        assert str(found.value) == str(wanted.value)
    assert ways.asked == []


def test_cancelling_closes_the_question(engine: fd.Engine) -> None:
    ways, settings = Ways(engine), {**ENDLESS, "gen_length": 480}
    del settings["max_tokens"]
    before = engine.stats.finished
    with remotely(ways) as away:
        request = away.submit(engine.encode(VAGUE), **settings)
        until(lambda: engine.stats.running == 1)
        request.cancel()
        with pytest.raises(CancelledError):
            request.result(60)
        until(lambda: ways.closed == 1)
        until(lambda: engine.stats.running == 0)
        assert engine.stats.finished == before, "it was not decoded to its end"
        left = away.submit(engine.encode(VAGUE), **settings)
        until(lambda: engine.stats.running == 1)
    assert left.cancelled, "by the end of all"
    until(lambda: engine.stats.free_pages == engine.stats.num_pages)
    with pytest.raises(EngineClosed):
        away.submit(engine.encode(VAGUE))


def test_the_queue_is_counted_here(engine: fd.Engine) -> None:
    ways = Ways(engine)
    ways.alive["two"] = EngineStats()
    with remotely(ways, max_queue=3) as away:
        ids = engine.encode(VAGUE)
        requests = [away.submit(ids, gen_length=480, steps=480) for _ in range(2 * 4 + 3)]
        assert away.stats.queued == 11, "of which the replicas have not said that they run"
        with pytest.raises(QueueFull, match="3 requests wait; max_queue=3"):
            away.submit(ids)
        requests[5].cancel()
        requests.append(away.submit(ids))
        with pytest.raises(QueueFull):
            away.submit(ids)


def test_sums_over_replicas(engine: fd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK_EVERY", 0.01)
    ways = Ways(engine)
    first = EngineStats(running=2, num_pages=64, free_pages=60, finished=5, busy_seconds=1.5)
    ways.alive = {"a": first, "b": replace(first, finished=7)}
    with remotely(ways) as away:
        stats = away.stats
        assert (stats.replicas, stats.num_pages, stats.free_pages, stats.finished) == (2, 128, 120, 12)
        assert (stats.running, stats.queued, stats.busy_seconds) == (4, 0, 3.0)
        service = served(away)
        text = service.metrics.text().decode()
        assert "fastdllm_replicas 2.0" in text
        assert "fastdllm_answers_finished_total 12.0" in text
        del ways.alive["b"]
        stats = until(lambda: away.stats if away.stats.replicas == 1 else None)
        assert (stats.num_pages, stats.running, stats.finished) == (64, 2, 12), "counters do not go back"
        ways.alive = {"c": EngineStats(num_pages=64, free_pages=64, finished=1)}
        stats = until(lambda: away.stats if away.stats.free_pages == 64 else None)
        assert (stats.replicas, stats.finished) == (1, 13)


def test_without_a_replica_that_is_alive(engine: fd.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOOK_EVERY", 0.01)
    ways = Ways(engine)
    with remotely(ways) as away:
        service = served(away)
        assert answer(service, PATHS[0])
        ways.alive = {}
        until(lambda: service.status == "failed")
        assert refusal(post(service, PATHS[0]), 503)["code"] == "failed"
        ways.alive = {"new": EngineStats()}
        until(lambda: service.status == "ok")
        assert answer(service, PATHS[0])


def test_a_look_that_takes_too_long_changes_nothing(
    engine: fd.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LOOK_EVERY", 0.0)
    looks = 0

    class Slow(Ways):
        async def look(self) -> Mapping[str, EngineStats]:
            nonlocal looks
            looks += 1
            if looks > 1:
                raise TimeoutError
            return {"one": EngineStats(finished=3)}

    with remotely(Slow(engine)) as away:
        until(lambda: looks > 3)
        assert (away.stats.replicas, away.stats.finished, away.failure) == (1, 3, None)


# The command line


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--replicas", "2"], "--replicas=2; takes --ray too"),
        (["--max-replicas", "2"], "--max-replicas=2; takes --ray too"),
        (["--ray-address", "auto"], "--ray-address=auto; takes --ray too"),
        (["--ray", "--replicas", "0"], "--replicas=0; takes 1 or more"),
        (["--ray", "--max-replicas", "0"], "--max-replicas=0; takes 1 or more"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "--max-replicas=2; takes 3 or more"),
        (["--ray", "--cpus-per-replica", "0"], "--cpus-per-replica=0; takes 1 or more"),
    ],
)
def test_arguments_out_of_range(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *argv]) == 2
    assert capsys.readouterr().err == f"fastdllm-ext serve: {words}\n"


def test_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastdllm_ext.commands.cluster.find_spec", lambda name: None)
    assert main(["serve", "--ray"]) == 2
    assert capsys.readouterr().err == f"fastdllm-ext serve: {NEEDS}\n"


def test_without_the_option_ray_is_not_imported() -> None:
    code = (
        "import sys, fastdllm_ext.cli, fastdllm_ext.serve.command, fastdllm_ext.serve.replicas\n"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_leaves_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    sent = replicas._for_replicas(arguments("model", "--api-key", "secret", "--threshold", "0.8"))
    assert "secret" not in str(sent)
    assert (sent.model, sent.generation_config, sent.threshold) == (str(tmp_path / "model"), None, 0.8)
    assert replicas._for_replicas(arguments("GSAI-ML/LLaDA-8B-Instruct")).model == "GSAI-ML/LLaDA-8B-Instruct"


# A cluster of this machine


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = arguments("--ray", "--replicas", "2", "--cpus-per-replica", "1")
    opening = partial(replicas.open_replicas, options, max_queue=64, max_rows=8, num_pages=None)
    with cluster(options, quiet=True), running(opening, KEY) as found:
        early = until(lambda: found.server.started and httpx.get(f"{found.url}/health"))
        assert (early.status_code, early.json()) == (503, {"status": "loading"})
        assert refusal(asked(found.url), 503)["code"] == "loading"
        until(lambda: found.service.status == "ok", 120)
        yield found


def counts(server: Running) -> dict[str, EngineStats]:
    """Of each replica that is alive."""
    assert isinstance(server.service.engine, RemoteEngine)
    return dict(server.service.engine._alive)


def fresh(server: Running) -> Any:
    """Statistics that were asked for from now on."""
    for _ in range(2):
        seen = server.service.engine._alive  # type: ignore[union-attr]
        until(lambda seen=seen: server.service.engine._alive is not seen)  # type: ignore[union-attr,misc]
    return server.stats


def ask_server(server: Running, path: str = PATHS[0], **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body(path, **fields), headers=HEADERS, timeout=120)


@pytest.fixture(scope="module")
def one(engine: fd.Engine) -> Service:
    """The server over one engine."""
    return served(engine)


def processes() -> list[int]:
    """Of the replicas of this process's cluster, those of others on the machine left out."""
    from ray import serve

    (application,) = serve.status().applications
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"ServeReplica:{application}:".encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def timeless(response: httpx.Response) -> Any:
    """What a response holds, without times and names of its own."""
    text = response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        assert text.endswith("data: [DONE]\n\n"), text[-300:]
        return [bare(json.loads(event[6:])) for event in text.split("\n\n")[:-2]]
    return bare(response.json())


def bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: bare(held) for name, held in value.items() if name not in OF_TIME}
    if isinstance(value, list):
        return [bare(held) for held in value]
    return round(value, 3) if isinstance(value, float) else value


QUESTIONS: list[tuple[str, Json]] = [
    (PATHS[0], {}),
    (PATHS[1], {}),
    (PATHS[0], {"prompt": PROMPTS[1], "stream": True}),
    (PATHS[1], {"prompt": PROMPTS[2], "stream": True, "stream_options": {"include_usage": True}}),
    (PATHS[0], {"prompt": VAGUE, "n": 3, **SAMPLED}),
    (PATHS[1], {"prompt": VAGUE, "n": 2, "stop": ["="], **SAMPLED}),
    (PATHS[0], {"prompt": VAGUE, "logprobs": 0, "block_length": 8}),
    (PATHS[1], {"prompt": VAGUE, "logprobs": True, "stream": True, "block_length": 16, **SAMPLED}),
    (PATHS[0], {"prompt": VAGUE, "stream": True, "stream_mode": "denoise", "threshold": 0.999}),
    (PATHS[0], {"prompt": [PROMPTS[3], PROMPTS[4]], "echo": True, "rule": "klass"}),
    (PATHS[0], {"prompt": PROMPTS[5], "steps": 64, "cache": "prefix", "max_tokens": 64}),
]


def at_once_asked(server: Running, questions: list[tuple[str, Json]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(questions)) as others:
        return list(others.map(lambda question: ask_server(server, question[0], **question[1]), questions))


def alone_asked(one: Service) -> list[Any]:
    return [timeless(post(one, path, **fields)) for path, fields in QUESTIONS]


@with_ray
def test_answers_are_those_of_one_engine(server: Running, one: Service) -> None:
    found = at_once_asked(server, QUESTIONS * 4)
    assert [response.status_code for response in found] == [200] * len(found)
    wanted = alone_asked(one)
    for at, response in enumerate(found):
        assert timeless(response) == wanted[at % len(QUESTIONS)], QUESTIONS[at % len(QUESTIONS)]
    until(lambda: server.stats.running == 0)
    finished = [stats.finished for stats in counts(server).values()]
    assert len(finished) == 2
    assert min(finished) >= 8, "both took part"
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"], health.json()["replicas"]) == (200, "ok", 2)


@with_ray
def test_openai_s_client(server: Running, one: Service) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    wanted = texts(answer(one, PATHS[1], prompt=PROMPTS[0]))
    chat = client.chat.completions.create(model="demo", messages=USER)
    assert [choice.message.content for choice in chat.choices] == wanted
    chunks = client.chat.completions.create(model="demo", messages=USER, stream=True)
    assert ["".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)] == wanted
    ours = ask(one, "GET", "/v1/models").json()["data"][0]
    theirs = client.models.retrieve("demo")
    assert theirs.model_extra is not None
    assert theirs.model_extra["fastdllm"] == ours["fastdllm"]


@with_ray
def test_refusals_are_those_of_one_engine(server: Running, one: Service) -> None:
    for status, path, fields in (
        (400, PATHS[0], {"threshold": 2}),
        (400, PATHS[0], {"prompt": [10**6]}),
        (400, PATHS[1], {"rule": "nonsense"}),
        (404, PATHS[0], {"model": "gpt-4"}),
        (413, PATHS[1], {"max_tokens": 10**6}),
        (413, PATHS[0], {"prompt": [5] * 1000}),
    ):
        assert refusal(ask_server(server, path, **fields), status) == refusal(
            post(one, path, **fields), status
        )
    wrong = httpx.post(f"{server.url}{PATHS[0]}", json=body(PATHS[0]))
    assert refusal(wrong, 401)["code"] == "invalid_api_key"


@with_ray
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_pages_of_the_replica(server: Running, stream: bool) -> None:
    before = fresh(server)
    connection = raw(server, json.dumps(body(PATHS[0], n=3, stream=stream, **ENDLESS)).encode())
    until(lambda: server.stats.running == 3)
    assert server.stats.free_pages < server.stats.num_pages
    connection.close()
    stats = until(lambda: server.stats if server.stats.cancelled == before.cancelled + 3 else None)
    assert (stats.running, stats.queued, stats.finished) == (0, 0, before.finished)
    assert stats.free_pages == stats.num_pages


@with_ray
def test_the_queue_is_one_for_all_replicas(server: Running) -> None:
    held = [
        server.service.ready().submit([5], gen_length=480, steps=480, cache="none") for _ in range(2 * 8 + 64)
    ]
    full = refusal(ask_server(server), 429)
    assert (full["code"], full["message"]) == (
        "queue_full",
        "the queue is full: 64 requests wait; max_queue=64",
    )
    until(lambda: server.stats.running == 16)
    for request in held:
        request.cancel()
    until(lambda: server.stats.free_pages == server.stats.num_pages)
    assert ask_server(server).status_code == 200


@with_ray
def test_a_replica_that_is_killed_loses_nothing(server: Running, one: Service) -> None:
    wanted, names = alone_asked(one), set(counts(server))
    victim = processes()[0]
    with ThreadPoolExecutor(len(QUESTIONS) * 4) as others:
        pending = [others.submit(ask_server, server, path, **fields) for path, fields in QUESTIONS * 4]
        until(lambda: sum(one.done() for one in pending) >= 10)
        os.kill(victim, signal.SIGKILL)
        found = [one.result() for one in pending]
    for at, response in enumerate(found):
        assert response.status_code == 200, response.text
        _, fields = QUESTIONS[at % len(QUESTIONS)]
        if "stream_mode" in fields:
            continue  # its commits come twice where it was lost
        assert timeless(response) == wanted[at % len(QUESTIONS)], fields
    until(lambda: server.stats.replicas == 2 and set(counts(server)) != names, 120)
    assert victim not in processes()
    assert httpx.get(f"{server.url}/health").json()["replicas"] == 2


@with_ray
@pytest.mark.slow
def test_the_command_drains_and_leaves_nothing_behind() -> None:
    server, url, log = started("--ray", "--shutdown-timeout", "60")
    with server, ThreadPoolExecutor(5) as others:
        entries = others.submit(list, log)  # a pipe that nobody reads would stop it
        until(lambda: httpx.get(f"{url}/health", timeout=60).status_code == 200, 120)
        left = descendants(server.pid)
        assert len(left) > 2, "Ray's processes, and a replica"
        fields: Json = {"max_tokens": 64, "block_length": 64, "steps": 64, "cache": "none"}
        pending = [others.submit(asked, url, **fields) for _ in range(4)]
        until(lambda: httpx.get(f"{url}/health").json()["running"] == 4)
        server.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
        assert refusal(asked(url), 503)["code"] == "draining"
        assert [response.result().status_code for response in pending] == [200] * 4
        assert server.wait(60) == 0
        assert [entry["status"] for entry in entries.result() if "tokens" in entry] == [200] * 4
    until(lambda: not any(Path(f"/proc/{number}").exists() for number in left))


def descendants(number: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]
