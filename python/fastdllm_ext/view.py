"""Denoising in a terminal: the answer as it emerges, under a progress bar."""

from __future__ import annotations

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TextIO

from fastdllm_ext.decoding import Commit

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

__all__ = ["DenoisingView", "undisturbed", "visible", "wants_colour"]

MASK = "░"
COLOURS = ((0.9, "\x1b[32m"), (0.5, "\x1b[33m"), (0.0, "\x1b[31m"))  # by confidence: green, yellow, red
RESET = "\x1b[0m"
FRAME_SECONDS = 0.15  # to be watched: a step of a small model is over before it can be seen
LEAST_SECONDS = 0.04  # between frames that nothing waits for
INDENT = "    "
SIGNS = {"\n": "⏎", "\t": "⇥"}


class Cell(NamedTuple):
    """A position that is filled."""

    piece: str
    confidence: float
    step: int
    ends: bool


class Line(NamedTuple):
    """A line of a frame, and how many columns of the terminal it takes."""

    text: str
    columns: int


class DenoisingView:
    """A streamer that draws one row: redrawn in place on a terminal, a frame a step elsewhere.

    Of an answer that is longer than the screen a terminal shows the lines around the first open position.

    Args:
        tokenizer: decodes single tokens.
        gen_length: positions of the answer.
        eos_ids: what lies behind the first of them is not drawn.
        file: where to draw.
        frame_seconds: that a frame stays on a terminal, while the model waits. With 0 nothing waits, and
            frames that come too fast to be seen are left out.
    """

    def __init__(
        self,
        tokenizer: Any,
        gen_length: int,
        *,
        eos_ids: Sequence[int] = (),
        file: TextIO | None = None,
        frame_seconds: float = FRAME_SECONDS,
    ) -> None:
        self.tokenizer, self.eos_ids, self.frame_seconds = tokenizer, set(eos_ids), frame_seconds
        self.file = sys.stdout if file is None else file
        self.live = self.file.isatty()
        self.coloured = wants_colour(self.file)
        self.cells: list[Cell | None] = [None] * gen_length
        self.step = 0
        self._drawn: list[Line] = []
        self._drawn_at = -LEAST_SECONDS
        self._behind = False

    def put(self, value: Any) -> None:
        """Not used: :meth:`on_commit` sees everything."""

    def on_commit(self, commit: Commit) -> None:
        """Takes one step's tokens and draws the row."""
        for position, token, confidence in zip(
            commit.positions, commit.tokens, commit.confidence, strict=True
        ):
            ends = token in self.eos_ids
            piece = "∎" if ends else visible(self.tokenizer.decode([token]))
            self.cells[position] = Cell(piece, confidence, commit.step, ends)
        self.step = commit.step + 1
        self._draw_when_due()

    def restart(self, step: int) -> None:
        """Takes back what this step and later ones filled, and draws the row."""
        self.cells = [cell if cell is not None and cell.step < step else None for cell in self.cells]
        self.step = step
        self._draw_when_due()

    def draw(self) -> None:
        """Draws the row as it is."""
        columns, rows = self._size()
        lines = self._frame(columns, rows)
        back = self._back(columns) if self.live else ""
        self._drawn, self._drawn_at, self._behind = lines, time.monotonic(), False
        self.file.write(back + "".join(line.text + "\n" for line in lines))
        self.file.flush()
        if self.live and self.frame_seconds:
            time.sleep(self.frame_seconds)

    def end(self) -> None:
        """The row is complete."""
        if self._behind:
            self.draw()
        self.file.flush()

    def clear(self) -> None:
        """Removes the frame from a terminal."""
        if self.live:
            self.file.write(self._back(self._size()[0]))
            self.file.flush()
        self._drawn = []

    def _draw_when_due(self) -> None:
        hasty = self.live and not self.frame_seconds
        if hasty and time.monotonic() - self._drawn_at < LEAST_SECONDS:
            self._behind = True
        else:
            self.draw()

    def _size(self) -> tuple[int, int]:
        """Columns and rows, as they are at the moment."""
        with suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.file.fileno())
            if columns and rows:
                return columns, rows
        return shutil.get_terminal_size((100, 24))

    def _back(self, columns: int) -> str:
        """What takes the cursor to the frame's begin and erases it.

        Lines that have become wider than the terminal lie on several of its rows by now.
        """
        rows = sum(max(1, -(-line.columns // columns)) for line in self._drawn)
        return f"\x1b[{rows}F\x1b[J" if rows else ""

    def _frame(self, columns: int, rows: int) -> list[Line]:
        """Progress and text, no wider than the terminal, nor on one higher."""
        shown = self._until_eos()
        width = max(1, columns - 1 - len(INDENT))
        lines, focus = self._text(shown, width)
        first, room = 0, rows - 2
        where = ""
        if self.live and len(lines) > room >= 1:
            first = min(max(0, focus - room // 2), len(lines) - room)
            where = f", lines {first + 1}-{first + room} of {len(lines)}"
            lines = lines[first : first + room]
        filled = sum(cell is not None for cell in self.cells[:shown])
        bar = "█" * round(24 * filled / shown)
        head = f"  step {self.step:>3} [{bar:<24}] {filled:>3}/{shown} tokens{where}"
        if self.live:
            head = head[: columns - 1]
        return [Line(head, len(head)), *lines]

    def _until_eos(self) -> int:
        """Positions up to and including the first EOS with nothing open before it; else all."""
        for i, cell in enumerate(self.cells):
            if cell is None:
                break
            if cell.ends:
                return i + 1
        return len(self.cells)

    def _text(self, shown: int, width: int) -> tuple[list[Line], int]:
        """The row's tokens, wrapped, and the line of the first open one.

        Newlines are a sign, so that the frames keep their height.
        """
        wrapped, focus = _Wrapped(width), None
        for cell in self.cells[:shown]:
            if cell is None:
                wrapped.add(MASK, "")
                focus = len(wrapped.lines) if focus is None else focus
            else:
                wrapped.add(cell.piece, self._colour(cell.confidence))
        lines = wrapped.end()
        return lines, len(lines) - 1 if focus is None else focus

    def _colour(self, confidence: float) -> str:
        if not self.coloured:
            return ""
        return next((code for least, code in COLOURS if confidence >= least), COLOURS[-1][1])


class _Wrapped:
    """Text in lines of so many columns."""

    def __init__(self, width: int) -> None:
        self.width, self.lines = width, list[Line]()
        self._text, self._used, self._colour = "", 0, ""

    def add(self, piece: str, colour: str) -> None:
        for char in piece:
            columns = columns_of(char)
            if self._used + columns > self.width:
                self._break()
            if colour != self._colour:
                self._text += (RESET if self._colour else "") + colour
                self._colour = colour
            self._text += char
            self._used += columns

    def end(self) -> list[Line]:
        self._break()
        return self.lines

    def _break(self) -> None:
        text = self._text + (RESET if self._colour else "")
        self.lines.append(Line(INDENT + text, len(INDENT) + self._used))
        self._text, self._used, self._colour = "", 0, ""


def visible(text: str, keep: str = "") -> str:
    """Text for a terminal: characters that would control it become signs, but for those to ``keep``."""
    return "".join(
        SIGNS.get(char, "·")
        if unicodedata.category(char) in ("Cc", "Zl", "Zp") and char not in keep
        else char
        for char in text
    )


def columns_of(char: str) -> int:
    """Columns that a character takes on a terminal."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


@contextmanager
def undisturbed(terminal: TextIO) -> Iterator[None]:
    """While frames are drawn: keys that are typed do not show, and Ctrl-C throws no output away.

    Either would leave the cursor where it is not believed to be. What was typed is read afterwards.
    """
    if termios is None or not terminal.isatty():
        yield
        return
    file = terminal.fileno()
    before = termios.tcgetattr(file)
    during = [*before[:3], before[3] & ~termios.ECHO | termios.NOFLSH, *before[4:]]
    termios.tcsetattr(file, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def wants_colour(file: TextIO) -> bool:
    """A terminal that has colours, unless NO_COLOR is set (no-color.org)."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
