"""A request's answers in the making, watched until they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.serve.answers import Answer, Piece, merged
from fastdllm_ext.serve.errors import ApiError, internal_error
from fastdllm_ext.serve.logs import LOGGER, Record
from fastdllm_ext.serve.protocol import Body
from fastdllm_ext.serve.service import Service

__all__ = ["Job"]


class Job:
    """Engine requests that answer one request of HTTP.

    Args:
        service: that it is of.
        body: what was asked.
        record: for the log.

    Attributes:
        answers: prompt by prompt, ``n`` of each.
        prompt_tokens: of all prompts.
        config: settings of the first prompt's answers.
        error: why it was given up.
    """

    def __init__(self, service: Service, body: Body, record: Record) -> None:
        self.service, self.body, self.record = service, body, record
        self.answers: list[Answer] = []
        self.prompt_tokens = 0
        self.config: GenerationConfig | None = None
        self.error: ApiError | None = None

    def prompt(self, source: str | list[int], ids: list[int], config: GenerationConfig) -> None:
        """Submits a prompt's answers. Raises what ``Engine.submit`` does."""
        body, speech, engine = self.body, self.service.speech, self.service.ready()
        self.prompt_tokens += len(ids)
        self.config = self.config or config
        prefix = ""
        if body.echoes:
            prefix = source if isinstance(source, str) else speech.whole(source)
        for _ in range(body.n or 1):
            index = len(self.answers)
            request = engine.submit(ids, config=config, stream=index, every_commit=body.denoise)
            self.answers.append(Answer(index, request, speech, body.stops, prefix, body.scores))

    def settings(self) -> dict[str, Any]:
        """What a stream of commits begins with."""
        assert self.config is not None
        return {
            "prompt_tokens": self.prompt_tokens,
            "gen_length": self.config.gen_length,
            "block_length": self.config.block_length,
            "settings": self.config.to_dict(),
        }

    def cancel(self) -> None:
        """Frees what its answers hold; those that have ended are left."""
        for answer in self.answers:
            answer.request.cancel()

    def give_up(self, error: ApiError) -> None:
        """Ends it early. :meth:`pieces` then raises the error."""
        self.error = self.error or error
        self.cancel()

    @contextmanager
    def watched(self, receive: Any) -> Iterator[None]:
        """While it is answered: given up when the client goes away or the time is over; then noted.

        Args:
            receive: of ASGI, with the request's body read.
        """
        loop, seconds = asyncio.get_running_loop(), self.service.limits.seconds
        late = ApiError(504, f"not answered within {seconds:g} s", code="timeout")
        timer = loop.call_later(seconds, self.give_up, late)
        watcher = loop.create_task(self._until_left(receive))
        self.service.jobs.add(self)
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            self.cancel()
            self.service.jobs.discard(self)
            self._note()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Of all answers, as they come. ApiError where that fails."""
        try:
            async for piece in merged([answer.pieces() for answer in self.answers]):
                yield piece
        except CancelledError:
            raise self.error or self.service.unavailable() from None
        except Exception as error:
            LOGGER.exception("request %s failed", self.record.identity)
            raise internal_error() from error

    async def _until_left(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.give_up(ApiError(499, "the client has gone away"))

    def _note(self) -> None:
        record = self.record
        record.prompt_tokens = self.prompt_tokens
        record.tokens = sum(answer.tokens for answer in self.answers)
        record.nfe = sum(answer.nfe for answer in self.answers)
        record.answers = [answer.text for answer in self.answers]
        self.service.metrics.answers(self.prompt_tokens, self.answers)
