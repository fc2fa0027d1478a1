"""Prompts from the command line, from files and from JSONL: read, and checked without a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdllm_ext.decoding import GenerationConfig

__all__ = ["Asked", "add_prompt_arguments", "read_prompts"]

# What an answer's object holds; a line's own keys have other names.
ANSWER_KEYS = ("text", "finish_reason", "prompt_tokens", "tokens", "nfe", "seconds", "hash", "error")
ALIASES = {"max_tokens": "gen_length", "max_new_tokens": "gen_length"}
FIELDS = {f.name for f in dataclasses.fields(GenerationConfig)}


@dataclass(frozen=True)
class Asked:
    """A prompt, as it was given.

    Attributes:
        where: for messages: ``in.jsonl:3``.
        id: of its own, or the line's number, or the prompt's.
        prompt: text, token ids, or messages of a conversation.
        settings: its own fields of a :class:`GenerationConfig`.
        others: what else its line says.
    """

    where: str
    id: str | int
    prompt: str | list[int] | list[dict[str, str]]
    settings: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Messages, which only a chat template makes a prompt of."""
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Where prompts come from: for :func:`read_prompts`."""
    group = parser.add_argument_group("prompts", "Where none is given: the one that stands on stdin.")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    group.add_argument(
        "--file", action="append", metavar="FILE",
        help="whose whole text is a prompt; may be repeated; - is stdin",
    )  # fmt: skip
    group.add_argument(
        "--lines", action="store_true", help="every line of the files, or of stdin, is a prompt"
    )
    group.add_argument(
        "--jsonl", metavar="FILE",
        help='an object a line: "prompt" (text or token ids) or "messages", perhaps "id" and settings; '
        "what else it holds is passed on; - is stdin",
    )  # fmt: skip

    group.add_argument(
        "--chat", action="store_true", help="ask what is text through the tokenizer's chat template"
    )


def read_prompts(arguments: argparse.Namespace) -> list[Asked]:
    """The prompts that the arguments name, in order.

    Raises:
        ValueError: none, or of several kinds; text that is not UTF-8; a line that is none of JSONL; an id
            that comes twice. The message begins with file and line.
        OSError: no such file.
    """
    given = [option for option in ("prompt", "file", "jsonl") if getattr(arguments, option)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]}, --{given[1]}: takes one of them")
    if arguments.lines and given not in ([], ["file"]):
        raise ValueError(f"--lines, --{given[0]}: takes --file, or stdin")
    if arguments.prompt:
        return [Asked(f"prompt {n}", n, text) for n, text in enumerate(arguments.prompt, 1)]
    if arguments.jsonl:
        return _distinct(_of_object(line) for line in _lines([arguments.jsonl]))
    if not arguments.file and sys.stdin.isatty():
        raise ValueError("no prompt; takes --prompt, --file or --jsonl, or a prompt on stdin")
    files = arguments.file or ["-"]
    if arguments.lines:
        return [Asked(line.where, line.number, line.text) for line in _lines(files)]
    texts = [_without_end(_read(file)) for file in files]
    if not arguments.file and not texts[0]:
        raise ValueError("no prompt: stdin is empty")
    return [Asked(_name(file), n, text) for n, (file, text) in enumerate(zip(files, texts, strict=True), 1)]


@dataclass(frozen=True)
class _Line:
    where: str
    number: int  # goes on from file to file
    text: str


def _lines(files: list[str]) -> Iterator[_Line]:
    """The lines that are not empty."""
    before = 0
    for file in files:
        # Not splitlines: characters such as U+2028 end no line of a file.
        lines = _read(file).removesuffix("\n").split("\n")
        for n, text in enumerate(lines, 1):
            if text.strip():
                yield _Line(f"{_name(file)}:{n}", before + n, text.removesuffix("\r"))
        before += len(lines)


def _read(file: str) -> str:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{_name(file)}:{line}: takes UTF-8, found the byte {data[error.start]:#x}"
        ) from error


def _without_end(text: str) -> str:
    """Without the newline that ends a text file."""
    return text.removesuffix("\n").removesuffix("\r")


def _name(file: str) -> str:
    return "stdin" if file == "-" else file


def _distinct(found: Iterator[Asked]) -> list[Asked]:
    places: dict[str | int, str] = {}
    asked = list(found)
    for one in asked:
        if one.id in places:
            raise ValueError(
                f'{one.where}: "id" {one.id!r} is that of {places[one.id]} as well; takes another'
            )
        places[one.id] = one.where
    return asked


def _of_object(line: _Line) -> Asked:
    where = line.where
    try:
        held = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f'{where}: takes an object with "prompt" or "messages"')
    try:
        json.dumps(held, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    own = held.pop("id", line.number)
    if isinstance(own, bool) or not isinstance(own, (str, int)):
        raise ValueError(f'{where}: "id" is {own!r}; takes a string or a whole number')
    sources = [key for key in ("prompt", "messages") if key in held]
    if len(sources) != 1:
        raise ValueError(f'{where}: takes "prompt" or "messages", has {" and ".join(sources) or "neither"}')
    value = held.pop(sources[0])
    _check_source(where, sources[0], value)
    settings: dict[str, Any] = {}
    for key in [key for key in held if key in FIELDS or key in ALIASES]:
        name = ALIASES.get(key, key)
        if name in settings:
            raise ValueError(f"{where}: names {name} twice")
        settings[name] = held.pop(key)
    for key in ANSWER_KEYS:
        if key in held:
            raise ValueError(f'{where}: "{key}" is a name of the answer; takes another')
    return Asked(where, own, value, settings, held)


def _check_source(where: str, name: str, value: Any) -> None:
    if name == "messages":
        good = isinstance(value, list) and bool(value) and all(map(_is_message, value))
        wanted = 'a list of {"role": text, "content": text}'
    else:
        good = isinstance(value, str) or (
            isinstance(value, list) and bool(value) and all(map(_is_int, value))
        )
        wanted = "text, or a list of token ids"
    if not good:
        found = json.dumps(value)
        raise ValueError(f'{where}: "{name}" is {found[:60]}{"..." * (len(found) > 60)}; takes {wanted}')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
