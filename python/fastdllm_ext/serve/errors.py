"""What a client is told when a request cannot be answered, in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from fastdllm_ext import rules

__all__ = ["ApiError", "internal_error", "of_engine"]

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client.
        param: the request's field that it is about.
        code: OpenAI's short name of the case, where it has one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def internal_error() -> ApiError:
    """Of which a client learns no more."""
    return ApiError(500, "internal error; the server's log has more")


def of_engine(error: Exception, fields: Collection[str], renamed: dict[str, str]) -> ApiError:
    """A complaint of the engine or of its settings, which begins with an argument's name, as a 400.

    Args:
        error: the complaint.
        fields: the request's fields.
        renamed: arguments that the request calls otherwise.
    """
    message = str(error)
    for ours, theirs in renamed.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    name = (re.match(r"\w+", message) or [""])[0]
    if name in rules.RULES:
        name, message = "rule", f"rule {message}"
    return ApiError(400, message, param=name if name in fields else None)
