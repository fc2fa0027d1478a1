"""A program of ours on a pseudo-terminal, and what stands on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

# The terminal becomes the program's own, so that Ctrl-C reaches it, and is heard: a shell's job in the
# background, which the tests may be, inherits that it is not.
START = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastdllm_ext.cli import main
sys.exit(main(sys.argv[1:]))
"""
DEADLINE = 120.0  # seconds: longer than any machine takes
CONTROL = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")


def set_size(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def without_controls(text: str) -> str:
    return CONTROL.sub("", text)


def screen_of(output: str, columns: int = 100) -> list[str]:
    """The lines of a terminal high enough for all that was written to it, without blanks at their ends."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(output):
        control = CONTROL.match(output, at)
        if control:
            at = control.end()
            if control[1] or control[3] == "m":
                continue
            number = int(control[2] or (0 if control[3] in "JK" else 1))
            if control[3] == "F":
                row, column = max(0, row - number), 0
            elif control[3] == "J" and number == 0:
                lines[row:] = [lines[row][:column]]
            elif control[3] == "K" and number == 0:
                lines[row] = lines[row][:column]
            elif control[3] == "C":
                column += number
            else:
                raise ValueError(f"{control[0]!r} is not understood")
            continue
        char = output[at]
        at += 1
        if char == "\n":
            row += 1
        elif char == "\r":
            column = 0
        elif char == "\b":
            column -= 1
        elif char >= " ":
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


class Terminal:
    """`fastdllm-ext ARGUMENTS` with a terminal of its own.

    Attributes:
        output: all that it wrote.
    """

    def __init__(
        self, *arguments: str, columns: int = 100, rows: int = 30, cwd: Path | None = None, **variables: str
    ) -> None:
        self.ours, theirs = pty.openpty()
        set_size(self.ours, columns, rows)
        quiet = {"TERM": "xterm", "INPUTRC": os.devnull, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.program = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=kept | quiet | variables,
            cwd=cwd,
        )
        os.close(theirs)
        self.output, self._seen = "", 0
        self._bytes = b""

    def send(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, text: str) -> None:
        """Until it has written the text, behind what was waited for before."""
        deadline = time.monotonic() + DEADLINE
        while (found := without_controls(self.output).find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output[-2000:]!r}"
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"ended without {text!r}: {self.output[-2000:]!r}")
        self._seen = found + len(text)

    def status(self) -> int:
        """Its exit status, once it has ended."""
        deadline = time.monotonic() + DEADLINE
        while self._read(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"goes on: {self.output[-2000:]!r}"
        return self.program.wait(DEADLINE)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.ours)

    def _read(self, seconds: float) -> bool:
        """Reads what is there, or comes within so long; False at the end."""
        if not select.select([self.ours], [], [], max(0.0, seconds))[0]:
            return True
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # Linux' way to say that nobody writes any more
            return False
        self._bytes += data
        self.output = self._bytes.decode(errors="ignore")
        return bool(data)
