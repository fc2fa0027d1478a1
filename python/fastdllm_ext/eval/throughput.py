"""Tokens per second, forwards and tokens per forward of an evaluation, by task and in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Throughput", "format_throughput", "summary"]


@dataclass(frozen=True)
class Answer:
    """What one request cost.

    Attributes:
        task: the name of its task.
        tokens: generated, up to and including EOS.
        tokens_after_stops: of the text that the task gets, cut at its stop strings and tokenized again.
        nfe: forwards that its row took part in.
    """

    task: str
    tokens: int
    tokens_after_stops: int
    nfe: int


@dataclass
class Throughput:
    """What one process generated: every answer, and for each task the seconds that the calls took."""

    answers: list[Answer] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, task: str, seconds: float, answers: Sequence[Answer]) -> None:
        """Takes down one batch, all of one task."""
        self.answers += answers
        self.seconds[task] += seconds


def summary(processes: Sequence[Throughput]) -> dict[str, Any]:
    """{"all": figures, "tasks": {task: figures}} of what one or more processes did side by side.

    Tokens are added up over the processes and divided by the seconds of the slowest. ``nfe`` and
    ``tokens_per_forward`` are means over requests. Empty where nothing was generated.
    """
    answers = [answer for process in processes for answer in process.answers]
    if not answers:
        return {}

    def figures(task: str | None) -> dict[str, Any]:
        found = [a for a in answers if task in (None, a.task)]
        seconds = max(sum(s for t, s in p.seconds.items() if task in (None, t)) for p in processes)
        tokens, after_stops = sum(a.tokens for a in found), sum(a.tokens_after_stops for a in found)
        return {
            "requests": len(found),
            "tokens": tokens,
            "tokens_after_stops": after_stops,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_after_stops": after_stops / seconds,
            "nfe": sum(a.nfe for a in found) / len(found),
            "tokens_per_forward": sum(a.tokens / a.nfe for a in found) / len(found),
        }

    tasks = sorted({answer.task for answer in answers})
    return {"all": figures(None), "tasks": {task: figures(task) for task in tasks}}


def format_throughput(found: dict[str, Any]) -> str:
    """A summary as aligned columns, with how it was counted."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("requests", lambda f: str(f["requests"])),
        ("tokens", lambda f: str(f["tokens"])),
        ("seconds", lambda f: f"{f['seconds']:.1f}"),
        ("tokens/s", lambda f: f"{f['tokens_per_second']:.1f}"),
        ("after stops", lambda f: f"{f['tokens_per_second_after_stops']:.1f}"),
        ("NFE", lambda f: f"{f['nfe']:.1f}"),
        ("tokens/forward", lambda f: f"{f['tokens_per_forward']:.2f}"),
    ]
    lines = list(found["tasks"].items())
    if len(lines) > 1:
        lines.append(("all", found["all"]))
    rows = [
        ["task", *(name for name, _ in columns)],
        *([name, *(text(figures) for _, text in columns)] for name, figures in lines),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    texts.insert(1, "-" * len(texts[0]))
    return "\n".join(
        [
            *texts,
            "tokens/s: generated tokens up to and including EOS, over the wall time of the generating calls;",
            "after stops: of the answer cut at the task's stop strings and tokenized again; NFE and",
            "tokens/forward: means over requests. Requests answered from lm_eval's cache are not counted.",
        ]
    )
