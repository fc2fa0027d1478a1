"""From a request's bytes to engine requests: what depends on the model is checked here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine import Engine, EngineClosed, QueueFull, RequestTooLong
from fastdllm_ext.serve.errors import ApiError, of_engine
from fastdllm_ext.serve.job import Job
from fastdllm_ext.serve.logs import Record
from fastdllm_ext.serve.protocol import Body, parse
from fastdllm_ext.serve.remote import RemoteEngine
from fastdllm_ext.serve.service import Service

__all__ = ["take"]

# From here on it takes milliseconds, and is done beside the event loop.
LONG_BODY = 8192  # bytes
MANY_ANSWERS = 8


async def take(service: Service, kind: type[Body], raw: bytes, record: Record) -> Job:
    """Takes a request in. ApiError where it cannot be answered; nothing of it is then left in the engine."""
    long = len(raw) > LONG_BODY
    body = await asyncio.to_thread(parse, kind, raw) if long else parse(kind, raw)
    service.known(body.model)
    if long or body.answer_count > MANY_ANSWERS:
        return await asyncio.to_thread(_submit, service, body, record)
    return _submit(service, body, record)


def _submit(service: Service, body: Body, record: Record) -> Job:
    engine, most = service.ready(), service.limits.answers
    if body.answer_count > most:
        raise ApiError(
            400, f"n={body.n or 1}: {body.answer_count} answers in all; takes {most} at most", param="n"
        )
    given = _decoding(engine, body)
    sources = body.sources(lambda messages: _render(service, messages))
    job = Job(service, body, record)
    record.prompts = sources
    try:
        for source in sources:
            ids = service.speech.encode(source, not body.templated) if isinstance(source, str) else source
            job.prompt(source, ids, _config(engine, body, given, len(ids)))
    except (EngineClosed, QueueFull, TypeError, ValueError) as error:
        job.cancel()
        raise _refusal(service, body, error) from error
    except BaseException:
        job.cancel()
        raise
    return job


def _refusal(service: Service, body: Body, error: Exception) -> ApiError:
    """What a client is told of what the engine said."""
    if isinstance(error, EngineClosed):
        return service.unavailable()
    if isinstance(error, QueueFull):
        return ApiError(429, f"the queue is full: {error}", code="queue_full", headers={"Retry-After": "1"})
    renamed = {"gen_length": "max_tokens", "input_ids": body.prompt_name}
    refusal = of_engine(error, type(body).model_fields, renamed)
    if isinstance(error, RequestTooLong):
        refusal.status, refusal.code = 413, "context_length_exceeded"
    return refusal


def _render(service: Service, messages: list[dict[str, str]]) -> str:
    if not service.speech.has_chat:
        message = f"messages: {service.name} has no chat template; takes POST /v1/completions"
        raise ApiError(400, message, param="messages")
    try:
        return service.speech.chat(messages)
    except TemplateError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error


def _decoding(engine: Engine | RemoteEngine, body: Body) -> dict[str, Any]:
    """The settings that were given. Families without top-p and top-k take what leaves a choice to all."""
    given = body.decoding()
    if not engine.family.samples_first:
        if given.pop("top_p", 1) != 1:
            raise ApiError(400, f"top_p={body.top_p}; this model takes 1 alone", param="top_p")
        if "top_k" in given:
            raise ApiError(400, f"top_k={body.top_k}; this model takes null alone", param="top_k")
    return given


def _config(
    engine: Engine | RemoteEngine, body: Body, given: Mapping[str, Any], prompt: int
) -> GenerationConfig:
    """Settings of the answers to a prompt of so many tokens; their length is by default what fits."""
    wanted, room = body.answer_length, engine.longest - prompt
    if room < (wanted or 1):
        answer = "" if wanted is None else f" and max_tokens={wanted}"
        raise ApiError(
            413,
            f"{body.prompt_name} of {prompt} tokens{answer}; takes {engine.longest} together",
            param=body.prompt_name if room < 1 else "max_tokens",
            code="context_length_exceeded",
        )
    length = min(int(engine.config.gen_length), room) if wanted is None else wanted  # type: ignore[arg-type]
    config = GenerationConfig.build(engine.config, {**given, "gen_length": length})
    if body.scores and config.ranks_by != "low_confidence":
        message = f"logprobs: {config.ranks_by!r} ranks by what is no probability; takes null"
        raise ApiError(400, message, param="logprobs")
    return config
