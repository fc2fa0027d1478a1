"""A server in a process of its own, and a client that costs it little: for load and for faults.

HTTP by hand, since a library's client takes as long for an answer as the small model does.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


class Server:
    """``fastdllm-ext serve`` with the bundled model, ready when it is entered.

    Args:
        arguments: of the command line, beside the port.
        log: file that it writes its log to.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.arguments, self.log = list(arguments), log
        self.port = 0

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "fastdllm_ext", "serve", "--port", "0", *self.arguments]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, stdout=log)
        ready = re.compile(rf"listening on http://{HOST}:(\d+)[\s\S]*serving ")
        end = time.monotonic() + 120
        while (found := ready.search(self.log.read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.port = int(found[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.status = self.stop()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    @property
    def resident(self) -> int:
        """Bytes of its memory."""
        fields = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    async def health(self) -> dict[str, Any]:
        """What /health says."""
        async with Connection(self.port) as connection:
            return (await connection.get("/health")).json


@dataclass
class Reply:
    """An answer over HTTP.

    Attributes:
        status: of HTTP.
        body: that was read: of a stream nothing.
        events: of a stream, with the seconds at which each came, since the request was sent.
        seconds: to the end.
    """

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """Of the first choice."""
        choices = [event["choices"][0] for _, event in self.events if event["choices"]]
        return "".join(c["text"] for c in choices) if self.events else str(self.json["choices"][0]["text"])

    @property
    def first_block(self) -> float:
        """Seconds to the first text."""
        return next(s for s, event in self.events if event["choices"] and event["choices"][0]["text"])

    @property
    def speed(self) -> dict[str, Any]:
        """What the server says of an answer."""
        return dict(next(e["fastdllm"] for _, e in reversed(self.events) if "fastdllm" in e))


class Connection:
    """One connection, kept open from request to request; opened again where the server closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves, whatever is under way."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def get(self, path: str) -> Reply:
        """GET."""
        return await self._ask(f"GET {path} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n\r\n".encode())

    async def complete(self, leave_after: int | None = None, **body: Any) -> Reply:
        """POST /v1/completions; of a stream, ``leave_after`` closes the connection after so many events."""
        return await self.post(json.dumps(body).encode(), leave_after)

    async def post(self, content: bytes, leave_after: int | None = None) -> Reply:
        """The same with a body as it is."""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return await self._ask(head.encode() + content, leave_after)

    async def send_and_leave(self, **body: Any) -> None:
        """Sends a request whole, and is gone."""
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        await self._open()
        assert self._writer is not None
        self._writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await self._writer.drain()
        self.close()

    async def _open(self) -> None:
        if self._writer is None or self._writer.is_closing() or self._reader is None or self._reader.at_eof():
            self._reader, self._writer = await asyncio.open_connection(HOST, self.port, limit=1 << 22)

    async def _ask(self, message: bytes, leave_after: int | None = None) -> Reply:
        await self._open()
        assert self._writer is not None
        assert self._reader is not None
        begin = time.perf_counter()
        self._writer.write(message)
        await self._writer.drain()
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        reply = Reply(int(head[0].split()[1]), headers)
        if headers.get("transfer-encoding") == "chunked":
            async for data in self._events():
                if data == b"[DONE]":
                    continue
                reply.events.append((time.perf_counter() - begin, json.loads(data)))
                if len(reply.events) == leave_after:
                    self.close()
                    break
        else:
            reply.body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        reply.seconds = time.perf_counter() - begin
        if headers.get("connection") == "close":
            self.close()
        return reply

    async def _events(self) -> AsyncIterator[bytes]:
        """Data of server-sent events, out of the chunks of a body."""
        assert self._reader is not None
        left = b""
        while True:
            size = int(await self._reader.readline(), 16)
            left += (await self._reader.readexactly(size + 2))[:size]
            *events, left = left.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: "):
                    yield event[len(b"data: ") :]
            if size == 0:
                return
