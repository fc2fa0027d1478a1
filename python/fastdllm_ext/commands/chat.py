"""`fastdllm-ext chat`: a conversation in the terminal, answers emerging as they are denoised.

Where stdin or stdout is no terminal: questions line by line, and answers, nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from jinja2 import TemplateError

from fastdllm_ext.checks import check_number
from fastdllm_ext.commands.opening import (
    add_model_arguments,
    add_settings_arguments,
    check_for_model,
    ending,
    open_engine,
)
from fastdllm_ext.decoding import DEFAULT_THRESHOLD, RULES, GenerationConfig
from fastdllm_ext.engine import Completion, Engine, Request, RequestTooLong
from fastdllm_ext.rules import Rule
from fastdllm_ext.serve.text import Speech
from fastdllm_ext.view import DenoisingView, undisturbed, visible, wants_colour

__all__ = ["Chat", "add_arguments", "run"]

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
PROMPT = "> "

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--frame-seconds", type=float, default=0.0, metavar="SECONDS",
        help="that each step stays to be seen; 0 keeps up with the model (0)",
    )  # fmt: skip
    add_settings_arguments(parser)
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends; the exit status: 1 where a question that nobody typed has no answer.

    Raises:
        TypeError, ValueError, OSError: settings or a model that are none.
    """
    if arguments.frame_seconds:
        check_number("--frame-seconds", arguments.frame_seconds, "of 0 or more", 0, math.inf)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with ending(), open_engine(arguments, max_rows=1) as engine:
        chat = Chat(engine, arguments.model, terminal=terminal, frame_seconds=arguments.frame_seconds)
        chat.greet()
        return chat.talk(typed() if terminal else sys.stdin)


def typed() -> Iterator[str]:
    """Lines that are typed, with a history where there is readline. Ctrl-C and Ctrl-D end them."""
    with suppress(ImportError):
        import readline  # noqa: F401  (changes what input() does)
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


class Chat:
    """A conversation.

    Args:
        engine: its ``config`` is what the conversation begins with; its tokenizer makes prompts of questions.
        name: of the model.
        terminal: someone sits there; else questions and answers are all there is.
        frame_seconds: as :class:`DenoisingView` has them.

    Attributes:
        config: how the next answer is decoded.
        messages: questions and answers so far, by turns.
        failed: a question had no answer.
    """

    def __init__(
        self, engine: Engine, name: str, *, terminal: bool = False, frame_seconds: float = 0.0
    ) -> None:
        self.engine, self.name, self.config = engine, name, engine.config
        self.terminal, self.frame_seconds = terminal, frame_seconds
        self.live = terminal and os.environ.get("TERM") != "dumb"
        self.speech = Speech(engine.tokenizer, engine.geometry.eos_ids)
        self.messages: list[Message] = []
        self.failed = False
        self._answers = 0
        self._leaves = False

    def greet(self) -> None:
        """Says who is there."""
        if self.terminal:
            parameters = sum(p.numel() for p in self.engine.model.parameters())
            self.say(
                f"{self.name}: {parameters / 1e6:.1f} M parameters. /help lists commands, Ctrl-D leaves."
            )
        if not self.speech.has_chat:
            self.say("The tokenizer has no chat template: each question goes alone, as it is.")

    def talk(self, lines: Iterator[str]) -> int:
        """Takes lines until they end, or one says so; the exit status."""
        for line in lines:
            try:
                self.take(line)
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                self.say("stopped; the question and what came of its answer are forgotten")
            if self._leaves:
                break
        return int(self.failed)

    def take(self, line: str) -> None:
        """Does what a line says: a command, or a question."""
        if line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            command = COMMANDS.get(name)
            if command is None:
                self.complain(f"{name}: takes {', '.join(COMMANDS)}; a blank before / makes it a question")
            else:
                command.run(self, rest.strip())
        elif line.strip():
            self.ask(line.strip())

    def ask(self, question: str) -> None:
        """Prints the answer, and keeps both; neither where it is interrupted or cannot be."""
        try:
            kept, request = self._submit({"role": "user", "content": question})
            completion = self._watched(request)
        except (TemplateError, TypeError, ValueError) as error:
            self.complain(str(error))
            return
        text = completion.text or ""
        answer: Message = {"role": "assistant", "content": text}
        self.messages = [*kept, answer]
        self._answers += 1
        if self.terminal:
            print(visible(text.replace("\r\n", "\n"), keep="\n\t"))
            self.say(self._numbers(completion))
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """What is no answer."""
        if not self.terminal:
            print(text, file=sys.stderr)
            return
        dim, plain = (DIM, PLAIN) if wants_colour(sys.stdout) else ("", "")
        print(dim + visible(text, keep="\n") + plain)

    def complain(self, text: str) -> None:
        """What went wrong."""
        self.failed |= not self.terminal
        self.say(text)

    def help(self, _: str) -> None:
        """/help."""
        width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            self.say(f"{f'{name} {command.takes}':<{width}}  {command.does}")
        self.say("Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does.")

    def forget(self, _: str) -> None:
        """/new."""
        self.messages = []

    def undo(self, _: str) -> None:
        """/undo."""
        if not self.messages:
            self.complain("/undo: nothing is there to take back")
        self.messages = self.messages[:-2]

    def set(self, rest: str) -> None:
        """/set."""
        name, _, text = rest.partition(" ")
        if not text.strip():
            self.complain("/set: takes a name and a value, such as threshold 0.8, cache prefix, steps null")
            return
        try:
            config = GenerationConfig.build(self.config, {name: value_of(text.strip())})
            check_for_model(self.engine.family, self.engine.geometry, config)
        except (TypeError, ValueError) as error:
            self.complain(f"/set: {error}")
        else:
            self.config = config

    def show_settings(self, _: str) -> None:
        """/settings."""
        values = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        if all(values[rule] is None for rule in RULES):
            values["threshold"] = DEFAULT_THRESHOLD
        for name, value in values.items():
            self.say(f"{name:<14} {value if isinstance(value, (str, Rule)) else json.dumps(value)}")

    def save(self, rest: str) -> None:
        """/save."""
        if not rest:
            self.complain("/save: takes a file")
            return
        held = {"model": self.name, "settings": self.config.to_dict(), "messages": self.messages}
        try:
            Path(rest).expanduser().write_text(
                json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            self.complain(f"/save: {error}")
        else:
            self.say(f"wrote {rest}")

    def leave(self, _: str) -> None:
        """/quit."""
        self._leaves = True

    def _submit(self, question: Message) -> tuple[list[Message], Request]:
        """The question and what is kept before it, and the request. Oldest turns go where it is too long."""
        begin = 0
        while True:
            kept = [*self.messages[begin:], question]
            try:
                request = self.engine.submit(
                    self._encoded(kept), config=self.config, stream=self._answers, every_commit=self.live
                )
            except RequestTooLong:
                if not self.speech.has_chat or len(kept) == 1:
                    raise
                begin += 2
                continue
            if begin:
                turns = f"{begin // 2} of {len(self.messages) // 2} turns"
                self.say(f"too long for the model: forgets the oldest {turns}")
            return kept, request

    def _encoded(self, messages: list[Message]) -> list[int]:
        if self.speech.has_chat:
            return self.speech.encode(self.speech.chat(messages), special=False)
        return self.speech.encode(messages[-1]["content"], special=True)

    def _watched(self, request: Request) -> Completion:
        """The completion; on a terminal its way there is drawn, and removed."""
        try:
            if self.live:
                self._draw(request)
            return request.result()
        finally:
            request.cancel()

    def _draw(self, request: Request) -> None:
        view = DenoisingView(
            self.engine.tokenizer,
            request.row.end - request.row.first,
            eos_ids=request.common.geometry.eos_ids,
            frame_seconds=self.frame_seconds,
        )
        with undisturbed(sys.stdin):
            try:
                view.draw()
                for update in request:
                    for commit in update.commits:
                        view.on_commit(commit)
                    if update.restarted_at is not None:
                        view.restart(update.restarted_at)
            finally:
                view.clear()

    def _numbers(self, completion: Completion) -> str:
        numbers = (
            f"{len(completion.tokens)} tokens, {completion.nfe} forwards, "
            f"{completion.tokens_per_forward:.1f} tokens a forward, {completion.seconds:.2f} s"
        )
        cut = f"; cut at gen_length={self.config.gen_length}"
        return numbers + (cut if completion.finish_reason == "length" else "")


@dataclasses.dataclass(frozen=True)
class Command:
    """What follows a slash."""

    run: Callable[[Chat, str], None]
    takes: str
    does: str


COMMANDS = {
    "/help": Command(Chat.help, "", "this"),
    "/new": Command(Chat.forget, "", "forget the conversation"),
    "/undo": Command(Chat.undo, "", "forget the last question and its answer"),
    "/set": Command(Chat.set, "NAME VALUE", "how to decode: threshold 0.8, cache prefix, steps null"),
    "/settings": Command(Chat.show_settings, "", "how answers are decoded"),
    "/save": Command(Chat.save, "FILE", "write the conversation as JSON"),
    "/quit": Command(Chat.leave, "", "leave"),
}


def value_of(text: str) -> object:
    """A setting's value: JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
