"""Answers in a file, line by line, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Record"]

# Of what a run writes down about itself: not a matter of its answers.
BESIDE = ("model", "fastdllm_ext")


class Record:
    """FILE, an object a line, and FILE.run.json, which says what run they are of.

    Opened, it belongs to this process alone.

    Args:
        path: FILE.
        restart: what is there goes when the run begins.

    Attributes:
        before: what FILE.run.json says; None where the run is new.
        answers: the objects that are there, by their ids; known once :meth:`begin` was called.

    Raises:
        OSError: a file that cannot be written.
        ValueError: another process writes it; it holds something else.
    """

    def __init__(self, path: Path, restart: bool = False) -> None:
        self.path, self.run_path = path, path.with_name(path.name + ".run.json")
        self.answers: dict[str | int, dict[str, Any]] = {}
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            empty = restart or os.fstat(self._file.fileno()).st_size == 0
            self.before = None if empty else self._read_run()
        except BaseException:
            self._file.close()
            raise

    def begin(self, run: Mapping[str, Any]) -> None:
        """Writes down what run this is, or goes on with what is there.

        Args:
            run: what answers depend on, as JSON can hold it.

        Raises:
            ValueError: what is there is of another run; the message says what differs. A broken line.
        """
        if self.before is None:
            self._file.truncate(0)
            self._write_run(run)
            return
        self._check_same(self.before, json.loads(json.dumps(run)))
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        size = 0
        for n, line in enumerate(lines, 1):
            answer = _object(line)
            if answer is None and n < len(lines):
                raise ValueError(f"{self.path}:{n}: holds no answer; takes --restart, or another file")
            if answer is None:
                break
            self.answers[answer["id"]] = answer
            size += len(line) + 1
        if torn or size < self._file.tell():
            self._file.truncate(size)

    def add(self, answer: Mapping[str, Any]) -> None:
        """Appends an object, and waits until it is on disk."""
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Gives the files back."""
        self._file.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: another process writes it") from error

    def _read_run(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            run = json.loads(self.run_path.read_text(encoding="utf-8"))
            if isinstance(run, dict):
                return run
        raise ValueError(
            f"{self.path}: holds something already, and no {self.run_path.name} says of what run; "
            "takes --restart, or another file"
        )

    def _write_run(self, run: Mapping[str, Any]) -> None:
        fresh = self.run_path.with_name(self.run_path.name + ".new")
        with open(fresh, "w", encoding="utf-8") as file:
            file.write(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.run_path)

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        was, is_now = _flat(before), _flat(now)
        names = [name for name in was | is_now if was.get(name) != is_now.get(name)]
        if all(name in BESIDE for name in names):
            return
        differ = "; ".join(f"{name} was {was.get(name)!r}, is {is_now.get(name)!r}" for name in names)
        raise ValueError(
            f"{self.path}: is of another run: {differ}; takes the same, --restart, or another file"
        )


def _object(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("id"), (str, int)) and "hash" in found:
            return found
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: ``settings.threshold``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
