"""The server as a process: it listens at once, loads its model meanwhile, and ends in order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from fastdllm_ext.engine import Engine
from fastdllm_ext.serve.logs import LOGGER
from fastdllm_ext.serve.remote import RemoteEngine
from fastdllm_ext.serve.service import Service

__all__ = ["Server", "listen"]

KEEP_ALIVE = 30  # seconds that a connection may lie idle
BACKLOG = 2048  # connections that wait to be accepted
LINGER = 5  # seconds that connections get to close in, after the last answer
COMPLAINTS = (ImportError, OSError, TypeError, ValueError)  # whose words are enough


class Server(uvicorn.Server):
    """Uvicorn, with a model that is loaded beside it. The first signal drains, the second ends at once.

    Args:
        app: what it runs.
        service: what that serves.
        shutdown_timeout: seconds that running requests get after the first signal.
    """

    def __init__(self, app: Any, service: Service, shutdown_timeout: float) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=LINGER,
        )
        super().__init__(config)
        self.service, self.shutdown_timeout = service, shutdown_timeout
        self._failure: BaseException | None = None
        self._loader: threading.Thread | None = None
        self._signalled = False
        self._drain: asyncio.Task[None] | None = None

    def serve_on(self, listener: socket.socket, open_engine: Callable[[], Engine | RemoteEngine]) -> int:
        """Until a signal, or until the model cannot be loaded; the exit status. Then :meth:`leave`."""
        host, port = listener.getsockname()[:2]
        LOGGER.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        self._loader = threading.Thread(
            target=self._load, args=(open_engine,), name="fastdllm-load", daemon=True
        )
        self._loader.start()
        self.run(sockets=[listener])
        if self._failure is not None:
            print(f"fastdllm-ext serve: {self._failure}", file=sys.stderr)
            return 1
        if self.service.engine is not None:
            self.service.engine.close()
        return 0

    def leave(self, status: int) -> int:
        """The process's last word: ends it where the model is still being loaded; else the status."""
        if self._loader is not None and self._loader.is_alive():
            _exit(status)  # it cannot be interrupted, and should not be torn down under
        return status

    def _load(self, open_engine: Callable[[], Engine | RemoteEngine]) -> None:
        try:
            self.service.open(open_engine())
        except BaseException as error:
            expected = isinstance(error, COMPLAINTS) or self._signalled  # then what it needed may be gone
            level = logging.DEBUG if expected else logging.ERROR
            LOGGER.log(level, "the model could not be loaded", exc_info=error)
            self.service.status, self._failure, self.should_exit = "failed", error, True
        else:
            LOGGER.info("serving %s", self.service.name)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn, which ends by the signal itself: here the first one is obeyed with status 0."""
        if self._signalled:
            _exit(128 + sig)
        self._signalled = True

    async def on_tick(self, counter: int) -> bool:
        """Of uvicorn, ten times a second."""
        if self._signalled and self._drain is None:
            self._drain = asyncio.create_task(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        LOGGER.info("shutting down")
        await self.service.drain(self.shutdown_timeout)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. OSError where there can be none.

    Its protocol is named, for asyncio sends without delay (TCP_NODELAY) on connections of such sockets alone;
    on others the end of an answer may wait 40 ms for the acknowledgement of its beginning.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"--host={host} --port={port}: {error.strerror or error}") from error
    return listener


def _exit(status: int) -> None:
    logging.shutdown()
    os._exit(status)
