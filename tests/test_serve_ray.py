"""The server over replicas on a Ray cluster, and what stands in it for their engines."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from fastdllm_ext.serve.app import create_app
from fastdllm_ext.serve.gate import Access
from fastdllm_ext.serve.process import Server, listen
from fastdllm_ext.serve.remote import Facts, Question, RemoteEngine, Word
from fastdllm_ext.serve.service import Limits, Service
from serving import PATHS, PROMPTS, Json, answer, body, demo, events, post, refusal, served, streamed, texts

ENDLESS: Json = {"max_tokens": 480, "block_length": 480, "steps": 480, "cache": "none"}  # seconds
VAGUE = "Add 4821 and 99."  # to which sampled answers differ
SAMPLED: Json = {"temperature": 1.0, "seed": 7}
with_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Waits for something to be so."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
    return found


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
    with remotely(ways) as away:
        request = away.submit(engine.encode(VAGUE), **settings)
        until(lambda: engine.stats.running == 1)
        request.cancel()
        with pytest.raises(CancelledError):
            request.result(60)
        until(lambda: ways.closed == 1)
        until(lambda: engine.stats.running == 0)
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
