"""Denoising in a terminal: the answer as it emerges, under a progress bar."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from fastdllm_ext.decoding import Commit

MASK = "░"
COLOURS = ((0.9, "\x1b[32m"), (0.5, "\x1b[33m"), (0.0, "\x1b[31m"))  # by confidence: green, yellow, red
RESET = "\x1b[0m"
FRAME_SECONDS = 0.15  # on a terminal: a step of a small model is over before it can be seen


class DenoisingView:
    """A streamer that draws one row: redrawn in place on a terminal, a frame a step elsewhere.

    Args:
        tokenizer: decodes single tokens.
        gen_length: positions of the answer.
        eos_ids: what lies behind the first of them is not drawn.
        file: where to draw.
    """

    def __init__(
        self, tokenizer: Any, gen_length: int, *, eos_ids: Sequence[int] = (), file: TextIO | None = None
    ) -> None:
        self.tokenizer, self.eos_ids = tokenizer, set(eos_ids)
        self.file = sys.stdout if file is None else file
        self.live = self.file.isatty()
        self.cells: list[tuple[int, float] | None] = [None] * gen_length
        self.drawn_lines = 0

    def put(self, value: Any) -> None:
        """Not used: :meth:`on_commit` sees everything."""

    def on_commit(self, commit: Commit) -> None:
        """Takes one step's tokens and draws the row."""
        for position, token, confidence in zip(
            commit.positions, commit.tokens, commit.confidence, strict=True
        ):
            self.cells[position] = (token, confidence)
        self._draw(commit.step + 1)

    def end(self) -> None:
        """The row is complete."""
        self.file.flush()

    def _draw(self, step: int) -> None:
        shown = self._until_eos()
        filled = sum(cell is not None for cell in self.cells[:shown])
        width = max(40, shutil.get_terminal_size((100, 24)).columns - 4)
        bar = "█" * round(24 * filled / shown)
        lines = [f"  step {step:>3} [{bar:<24}] {filled:>3}/{shown} tokens", *self._text(shown, width)]
        if self.live:
            if self.drawn_lines:
                self.file.write(f"\x1b[{self.drawn_lines}F\x1b[J")
            self.drawn_lines = len(lines)
            time.sleep(FRAME_SECONDS)
        self.file.write("\n".join(lines) + "\n")
        self.file.flush()

    def _until_eos(self) -> int:
        """Positions up to and including the first EOS with nothing open before it; else all."""
        for i, cell in enumerate(self.cells):
            if cell is None:
                break
            if cell[0] in self.eos_ids:
                return i + 1
        return len(self.cells)

    def _text(self, shown: int, width: int) -> list[str]:
        """The row's tokens, wrapped; newlines as a sign, so that the frames keep their height."""
        lines, line, used = [], "", 0
        for cell in self.cells[:shown]:
            if cell is None:
                piece, colour = MASK, ""
            else:
                token, confidence = cell
                special = token in self.eos_ids
                piece = "∎" if special else self.tokenizer.decode([token]).replace("\n", "⏎")
                colour = next(code for least, code in COLOURS if confidence >= least) if self.live else ""
            if used + len(piece) > width:
                lines.append(line)
                line, used = "", 0
            line += f"{colour}{piece}{RESET}" if colour else piece
            used += len(piece)
        return ["    " + text for text in (*lines, line)]
