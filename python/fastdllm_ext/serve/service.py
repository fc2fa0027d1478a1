"""What is served: a model's engine, its limits, and how it stands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastdllm_ext.serve.errors import ApiError
from fastdllm_ext.serve.logs import LOGGER
from fastdllm_ext.serve.metrics import Metrics
from fastdllm_ext.serve.remote import Facts, RemoteEngine
from fastdllm_ext.serve.text import Speech

if TYPE_CHECKING:
    from fastdllm_ext.engine import Engine
    from fastdllm_ext.serve.job import Job

__all__ = ["Limits", "Service"]

Status = Literal["loading", "ok", "draining", "failed"]
REASONS: dict[Status, str] = {
    "loading": "the model is being loaded",
    "ok": "the engine is closed",
    "draining": "the server is shutting down",
    "failed": "the model could not be loaded, its engine has failed, or no replica of it is alive",
}


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body_bytes: of a request.
        answers: of a request: prompts times ``n``.
        seconds: that an answer may take, its waiting included.
    """

    body_bytes: int = 4 << 20
    answers: int = 128
    seconds: float = 600.0


class Service:
    """One model under a name.

    Args:
        name: that requests give as ``model``.
        limits: of each request.
        log_texts: write prompts and answers into the log.

    Attributes:
        jobs: that are being answered.
    """

    def __init__(self, name: str, limits: Limits = Limits(), *, log_texts: bool = False) -> None:
        self.name, self.limits, self.log_texts = name, limits, log_texts
        self._status: Status = "loading"
        self.engine: Engine | RemoteEngine | None = None
        self.jobs: set[Job] = set()
        self.metrics = Metrics(lambda: None if self.engine is None else self.engine.stats)
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def status(self) -> Status:
        """ "loading" until :meth:`open`, "ok" until :meth:`drain` or a fault of the engine."""
        failed = self.engine is not None and self.engine.failure is not None
        return "failed" if failed and self._status == "ok" else self._status

    @status.setter
    def status(self, status: Status) -> None:
        self._status = status

    def open(self, engine: Engine | RemoteEngine) -> None:
        """The model is there. ValueError where its engine has no tokenizer."""
        if engine.tokenizer is None:
            raise ValueError(f"{self.name}: has no tokenizer; takes a model with one")
        facts = engine.facts if isinstance(engine, RemoteEngine) else Facts.of(engine)
        self.speech = Speech(engine.tokenizer, engine.geometry.eos_ids)
        self._card = {
            "id": self.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "fastdllm_ext",
            "fastdllm": {
                "max_positions": engine.longest,
                "max_tokens_default": engine.config.gen_length,
                "family": engine.family.model_type,
                "settings": engine.config.to_dict(),
                "takes_top_p": engine.family.samples_first,
                "has_chat": self.speech.has_chat,
                "parameters": facts.parameters,
            },
        }
        self.engine = engine
        if self.status == "loading":
            self.status = "ok"

    def ready(self) -> Engine | RemoteEngine:
        """The engine. ApiError while there is none that takes requests."""
        if self.status == "ok" and self.engine is not None:
            return self.engine
        raise self.unavailable()

    def unavailable(self) -> ApiError:
        """Why not, and when to ask again."""
        headers = {"Retry-After": "5"} | ({"Connection": "close"} if self.status == "draining" else {})
        return ApiError(503, REASONS[self.status], code=self.status, headers=headers)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While a request is: :meth:`drain` waits for it."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and waits for those under way; gives them up when the time is over."""
        self.status = "draining"
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            LOGGER.warning("%d requests given up after %g s", self._under_way, seconds)
            for job in list(self.jobs):
                job.give_up(self.unavailable())

    def card(self) -> dict[str, Any]:
        """The model, as ``GET /v1/models`` shows it."""
        self.ready()
        return self._card

    def known(self, model: str) -> None:
        """ApiError for another model."""
        if model != self.name:
            raise ApiError(
                404, f"model={model[:100]!r}; takes {self.name!r}", param="model", code="model_not_found"
            )
