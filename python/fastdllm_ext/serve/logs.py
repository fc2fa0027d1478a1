"""One line a request, as text or as JSON; what was asked and answered only where that is wanted."""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

__all__ = ["LOGGER", "Record", "configure"]

LOGGER = logging.getLogger("fastdllm_ext.serve")


@dataclass
class Record:
    """What is known of a request when it has ended.

    Attributes:
        endpoint: the route, or "other".
        status: of the response; 499 where the client went away first.
        begun: by ``time.perf_counter()``.
        tokens: of all its answers.
    """

    identity: str = field(default_factory=lambda: secrets.token_hex(12))
    method: str = ""
    endpoint: str = "other"
    status: int = 0
    begun: float = field(default_factory=time.perf_counter)
    prompt_tokens: int | None = None
    tokens: int | None = None
    nfe: int | None = None
    prompts: list[Any] | None = None
    answers: list[str] | None = None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.begun

    def facts(self, texts: bool) -> dict[str, Any]:
        """What is logged; with ``texts`` also what was asked and answered."""
        facts = {
            "id": self.identity,
            "method": self.method,
            "endpoint": self.endpoint,
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "nfe": self.nfe,
        }
        if texts:
            facts |= {"prompts": self.prompts, "answers": self.answers}
        return {name: value for name, value in facts.items() if value is not None}


class _Lines(logging.Formatter):
    """``time level message name=value ...``, values as JSON, so that none breaks the line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(
            f" {name}={json.dumps(value, ensure_ascii=False)}"
            for name, value in getattr(record, "facts", {}).items()
        )
        return super().format(record) + facts


class _Objects(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(level: str, as_json: bool, stream: TextIO | None = None) -> None:
    """Logs of the whole process to ``stream``, by default stderr.

    Args:
        level: "debug", "info", "warning" or "error".
        as_json: an object a line.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Objects() if as_json else _Lines("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(level.upper())
