"""The routes."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from copy import deepcopy
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import fastdllm_ext
from fastdllm_ext.serve import protocol
from fastdllm_ext.serve.errors import ApiError
from fastdllm_ext.serve.gate import OPEN, Access, Gate, Message, Send
from fastdllm_ext.serve.intake import take
from fastdllm_ext.serve.job import Job
from fastdllm_ext.serve.replies import CHAT, COMPLETIONS, Dialect, Reply, encode
from fastdllm_ext.serve.service import Service

__all__ = ["create_app"]

DESCRIPTIONS = {
    400: "A field is wrong; the message names it",
    401: "No API key, or a wrong one",
    403: "The Host header names another machine",
    404: "No such model",
    413: "The body, or prompt and answer, are too long",
    429: "The queue is full",
    500: "A failure of the server",
    503: "The model is being loaded, or the server is shutting down",
    504: "Not answered in time",
}
# Name, path, what it takes, what it gives, and how.
ENDPOINTS = (
    ("complete", "/v1/completions", protocol.CompletionRequest, protocol.CompletionResponse, COMPLETIONS),
    ("chat", "/v1/chat/completions", protocol.ChatRequest, protocol.ChatResponse, CHAT),
)
# Of an engine, or of replicas of one.
HEALTH = ("queued", "running", "free_pages", "num_pages", "replicas")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Those that a route may give, for the description."""
    return {
        status: {"model": protocol.ErrorResponse, "description": DESCRIPTIONS[status]} for status in statuses
    }


def create_app(service: Service, access: Access | None = None, page: bytes | None = None) -> FastAPI:
    """The server's application.

    Args:
        service: what it serves.
        access: who may ask; by default everyone.
        page: what ``/`` shows; by default the package's, where it has one. Empty is none.
    """
    access = access or Access()
    app = _Described(
        title="fastdllm_ext",
        version=fastdllm_ext.__version__,
        docs_url=None,  # would fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.model, app.bears_key = service.name, access.key is not None
    app.add_middleware(Gate, service=service, access=access)
    app.add_exception_handler(HTTPException, _no_route)
    for name, path, kind, response, dialect in ENDPOINTS:
        described = _described(kind, response)
        app.post(path, name=name, operation_id=name, **described)(_answering(service, kind, dialect))

    @app.get("/v1/models", responses=errors(401, 403, 503), response_model=protocol.ModelList)
    async def list_models() -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [service.card()]})

    @app.get(
        "/v1/models/{model:path}", responses=errors(401, 403, 404, 503), response_model=protocol.ModelCard
    )
    async def show_model(model: str) -> Response:
        """The model, by its name."""
        card = service.card()
        service.known(model)
        return _json(card)

    @app.get(
        "/health",
        response_model=protocol.Health,
        response_model_exclude_none=True,
        responses={**errors(403), 503: {"model": protocol.Health, "description": DESCRIPTIONS[503]}},
    )
    async def health() -> Response:
        """Whether requests are taken."""
        facts: dict[str, Any] = {"status": service.status}
        if service.engine is not None:
            stats = service.engine.stats
            facts |= {name: getattr(stats, name) for name in HEALTH if hasattr(stats, name)}
        return _json(facts, 200 if service.status == "ok" else 503)

    text = {
        "content": {"text/plain": {"schema": {"type": "string"}}},
        "description": "Prometheus's text format",
    }

    @app.get("/metrics", responses={200: text, **errors(401, 403)}, response_class=Response)
    async def metrics() -> Response:
        """Counters, histograms and the engine's state."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    _add_page(app, _own_page() if page is None else page)
    return app


def _described(kind: type[protocol.Body], response: type[BaseModel]) -> dict[str, Any]:
    """What the description says of an endpoint that answers."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "a chunk as JSON; at the end [DONE]"}},
    }
    whole_or_stream = {
        "model": response,
        "content": {"text/event-stream": {"schema": event}},
        "description": "The answer, whole or as a stream",
    }
    return {
        "responses": {200: whole_or_stream, **errors(*DESCRIPTIONS)},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    }


def _answering(
    service: Service, kind: type[protocol.Body], dialect: Dialect
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers."""

    async def answer(request: Request) -> Response:
        service.ready()
        record = request.state.record
        raw = await _body(request, service.limits.body_bytes)
        job = await take(service, kind, raw, record)
        body = job.body
        reply = Reply(
            dialect,
            record.identity,
            service.name,
            job.answers,
            job.prompt_tokens,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            settings=job.settings() if body.denoise else None,
        )
        if body.stream:
            return _EventStream(job, reply)
        with job.watched(request.receive):
            async for _ in job.pieces():
                pass
        return _json(reply.whole())

    return answer


class _EventStream(Response):
    """Server-sent events, the last of them ``[DONE]``, or an error."""

    def __init__(self, job: Job, reply: Reply) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._job, self._reply = job, reply

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:  # type: ignore[override]
        with self._job.watched(receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._reply.chunks(self._job.pieces()):
                yield b"data: " + encode(chunk) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            self._job.record.status = error.status  # what the client was told first is past changing
            yield b"data: " + encode(error.body()) + b"\n\n"


async def _body(request: Request, limit: int) -> bytes:
    """A request's body. ApiError where it is too long, which is found while it is read, or is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, f"Content-Type: {kind[:100]!r}; takes application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ApiError(
                413,
                f"the body has more than {limit} bytes; takes {limit}",
                code="body_too_long",
                headers={"Connection": "close"},
            )
        parts.append(part)
    return b"".join(parts)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405, of the router."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "other methods")
    words = {404: "no such path", 405: f"{request.method} is not allowed; takes {allowed}"}
    refusal = ApiError(error.status_code, words.get(error.status_code, str(error.detail)))
    response = _json(refusal.body(), error.status_code)
    response.headers.update(error.headers or {})
    return response


def _own_page() -> bytes | None:
    page = files("fastdllm_ext.serve") / "page.html"
    return page.read_bytes() if page.is_file() else None


def _add_page(app: FastAPI, page: bytes | None) -> None:
    """``/``: a page that may run its own scripts and styles, ask this server, and nothing else."""
    if not page:
        return
    headers = {
        "Content-Security-Policy": content_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers=headers)


def content_policy(page: bytes) -> str:
    """Allows a page the inline scripts and styles that it has now, by their hashes."""

    def hashes(tag: bytes) -> str:
        inside = re.findall(rb"<%b\b[^>]*>(.*?)</%b>" % (tag, tag), page, re.DOTALL | re.IGNORECASE)
        digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inside]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Described(FastAPI):
    """FastAPI, with the request bodies that are checked by hand in its description, and the API key.

    Attributes:
        model: the only one that requests may name.
        bears_key: requests bear a key.
    """

    model: str
    bears_key: bool

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        found = super().openapi()
        parts = found["components"]["schemas"]
        for _, _, kind, _, _ in ENDPOINTS:
            schema = deepcopy(protocol.schema_of(kind))
            schema["properties"]["model"]["enum"] = [self.model]
            parts |= schema.pop("$defs", {})
            parts[kind.__name__] = schema
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which is not sent
            parts.pop(name, None)
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if self.bears_key and path not in OPEN:
                    operation["security"] = [{"bearer": []}]
        if self.bears_key:
            found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return found
