"""Engines on a Ray cluster, as replicas of a Ray Serve deployment, and the way to them.

Requests reach them through a deployment handle, not through Ray Serve's HTTP proxy: the server is the process
that was started. Importing this does not import Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastdllm_ext.commands.cluster import actor_options
from fastdllm_ext.commands.opening import open_engine, open_tokenizer
from fastdllm_ext.engine import Engine, EngineStats
from fastdllm_ext.serve.logs import LOGGER
from fastdllm_ext.serve.remote import Facts, Question, RemoteEngine, Word

__all__ = ["Replica", "open_replicas"]

DEPLOYMENT = "engine"
PATIENCE = 10.0  # seconds that replicas get to say how they are
ORPHANED = 60.0  # seconds without being asked how it is, after which a replica takes its server for dead
HEALTH_EVERY = 2.0  # seconds
# Seconds in which a replica says how much it has. Ray Serve's tenth of one is short for a process that
# computes, and whoever is late gets nothing for a while.
DEADLINE = ("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1")
COMPLAINTS = (ImportError, OSError, TypeError, ValueError)  # of arguments: another replica has them too


class Replica:
    """An engine, and what Ray Serve calls of it.

    Args:
        arguments: of :func:`open_engine`.
        limits: of the engine.
        application: that it is part of.
    """

    def __init__(
        self, arguments: argparse.Namespace, limits: dict[str, int | None], application: str
    ) -> None:
        self._name, self._application = secrets.token_hex(8), application
        self._opened: Engine | Exception
        try:
            self._opened = open_engine(arguments, **limits)
        except COMPLAINTS as error:  # for whoever asks; Ray Serve would try again
            self._opened = error
        self._begun = time.monotonic()
        self._asked: float | None = None  # how it is, last; never before all of the first replicas are there

    @property
    def engine(self) -> Engine:
        """Raises why there is none."""
        if isinstance(self._opened, Exception):
            raise self._opened
        return self._opened

    async def facts(self) -> Facts | Exception:
        """Of its engine; or why there is none."""
        if isinstance(self._opened, Exception):
            return self._opened
        return Facts.of(self._opened)

    async def decode(self, question: Question) -> AsyncIterator[Word]:
        """Answers. Fails where the engine does; what is wrong with the question is the last word."""
        request = self.engine.submit(**vars(question))
        try:
            async for update in request:
                yield update
            last: Word = request.result()
        except CancelledError:  # by the engine's end
            raise
        except Exception as error:
            if self.engine.failure is not None:
                raise
            last = error
        finally:
            request.cancel()
        yield last

    async def report(self) -> tuple[str, EngineStats]:
        """Its name, another one at each start, and its statistics."""
        self._asked = time.monotonic()
        self._check()
        return self._name, self.engine.stats

    async def check_health(self) -> None:
        """Ray Serve's question: a replica that fails it is replaced. One that nobody needs ends them all."""
        now = time.monotonic()
        if self._asked is not None and now - self._asked > ORPHANED:
            await asyncio.to_thread(_delete, self._application)
        # Whoever started replicas that have no engine is told why, and is to have the time to ask.
        if isinstance(self._opened, Engine) or now - self._begun > ORPHANED:
            self._check()

    def _check(self) -> None:
        if (failure := self.engine.failure) is not None:
            raise RuntimeError(f"the engine has failed: {failure}") from failure

    def __del__(self) -> None:
        """Ray Serve's word for the end."""
        if isinstance(self._opened, Engine):
            self._opened.close()


def open_replicas(arguments: argparse.Namespace, *, max_queue: int, **limits: int | None) -> RemoteEngine:
    """Replicas of an engine, on the cluster that this is connected to, when all are there.

    Args:
        arguments: of :func:`open_engine` and :func:`add_cluster_arguments`.
        max_queue: requests that wait for all of them.
        **limits: of each engine.

    Raises:
        What :func:`open_engine` raises.
    """
    tokenizer = open_tokenizer(arguments)
    os.environ.setdefault(*DEADLINE)
    from ray import serve

    with ExitStack() as stack:
        _log_as_we_do()
        serve.start(proxy_location="Disabled")
        application = f"fastdllm-{secrets.token_hex(4)}"
        stack.callback(_delete, application)
        deployment = serve.deployment(**_options(arguments, limits, max_queue))(Replica)
        LOGGER.info("starting replicas as the Ray Serve application %s", application)
        bound = deployment.bind(_for_replicas(arguments), limits, application)
        handle = serve.run(bound, name=application, route_prefix=None)
        facts: Facts | Exception = handle.facts.remote().result()
        if isinstance(facts, Exception):
            raise facts
        asked: Any = handle.options(stream=True).decode

        async def ask(question: Question) -> AsyncGenerator[Word, None]:
            response = asked.remote(question)
            try:
                async for word in response:
                    yield word
            finally:
                response.cancel()

        async def look() -> Mapping[str, EngineStats]:
            reports = handle.broadcast("report").results_async(timeout_s=PATIENCE, return_exceptions=True)
            return dict(report for report in await reports if not isinstance(report, BaseException))

        return RemoteEngine(facts, tokenizer, ask, look, max_queue=max_queue, leave=stack.pop_all().close)


def _options(
    arguments: argparse.Namespace, limits: Mapping[str, int | None], max_queue: int
) -> dict[str, Any]:
    """Of the deployment. Who waits does so at a replica, which then never waits for the way; here they are
    counted."""
    least, most, rows = arguments.replicas or 1, arguments.max_replicas, limits["max_rows"] or 1
    growing = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": rows}
    return {
        "name": DEPLOYMENT,
        **({"num_replicas": least} if most is None else {"autoscaling_config": growing}),
        "ray_actor_options": actor_options(arguments),
        "max_ongoing_requests": rows + max_queue,
        "health_check_period_s": HEALTH_EVERY,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": arguments.shutdown_timeout,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def _for_replicas(arguments: argparse.Namespace) -> argparse.Namespace:
    """What of the arguments leaves this process: no key, and folders by their whole paths."""
    held = {name: value for name, value in vars(arguments).items() if name != "api_key"}
    for name in ("model", "generation_config"):
        if held[name] is not None and Path(held[name]).is_dir():
            held[name] = str(Path(held[name]).resolve())
    return argparse.Namespace(**held)


def _log_as_we_do() -> None:
    """What Ray Serve says in this process goes where our own lines go."""
    theirs = logging.getLogger("ray.serve")
    theirs.handlers.clear()
    theirs.propagate = True
    theirs.setLevel(logging.WARNING)


def _delete(application: str) -> None:
    from ray import serve

    serve.delete(application)
