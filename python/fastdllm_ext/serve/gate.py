"""The outermost layer: who may ask, what a failure looks like, and what is noted of a request."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastdllm_ext.serve.errors import ApiError, internal_error
from fastdllm_ext.serve.logs import LOGGER, Record
from fastdllm_ext.serve.replies import encode
from fastdllm_ext.serve.service import Service

__all__ = ["OPEN", "Access", "Gate", "is_loopback", "send_json"]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/", "/health")  # without a key


class Access:
    """Who may ask.

    Args:
        key: that requests bear, if any.
        hosts: names in ``Host`` beside those of the loopback; None is any. Without the check, a page of the
            web whose name leads to this machine could read what a server on it says.
    """

    def __init__(self, key: str | None = None, hosts: Collection[str] | None = None) -> None:
        self.key = None if key is None else key.encode()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    def check(self, path: str, headers: Collection[tuple[bytes, bytes]]) -> None:
        """ApiError for a request that may not."""
        for name, value in headers if self.hosts is not None else ():
            if name == b"host" and not self._is_ours(value.decode("latin-1")):
                raise ApiError(
                    403, "Host names another machine; takes this one's, or --allowed-host", code="host"
                )
        if self.key is None or path in OPEN:
            return
        found = next((value for name, value in headers if name == b"authorization"), b"")
        kind, _, key = found.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
            what = "has no API key" if not found else "has a wrong API key"
            raise ApiError(
                401,
                f"the request {what}; takes Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_ours(self, host: str) -> bool:
        match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:@/\[\]]+))(?::\d+)?", host)
        name = (match[1] or match[2]).lower() if match else ""
        return name in (self.hosts or ()) or is_loopback(name)


def is_loopback(host: str) -> bool:
    """``localhost``, or an address of the loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware: checks access, makes errors JSON, and notes every request.

    Args:
        app: inside.
        service: counts what is under way.
        access: who may ask.
    """

    def __init__(self, app: Any, service: Service, access: Access) -> None:
        self.app, self.service, self.access = app, service, access

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """A request, from its arrival to its end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(method=scope["method"])
        scope.setdefault("state", {})["record"] = record
        identity = (b"x-request-id", record.identity.encode())

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], identity]
            await send(message)

        with self.service.under_way():
            try:
                self.access.check(scope["path"], scope["headers"])
                await self.app(scope, receive, noted)
            except ApiError as error:
                await send_json(noted, error.status, error.body(), error.headers)
            except Exception:
                LOGGER.exception("request %s failed", record.identity)
                if not record.status:
                    refusal = internal_error()
                    await send_json(noted, refusal.status, refusal.body())
            finally:
                record.endpoint = getattr(scope.get("route"), "path", record.endpoint)
                self.service.metrics.request(record)
                LOGGER.info("request", extra={"facts": record.facts(self.service.log_texts)})


async def send_json(
    send: Send, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
) -> None:
    """A whole response."""
    body = encode(value)
    found = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    lines = [(name.lower().encode(), text.encode()) for name, text in found.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
