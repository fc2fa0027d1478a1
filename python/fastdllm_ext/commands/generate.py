"""`fastdllm-ext generate`: answers to prompts, one or a file of them.

    fastdllm-ext generate MODEL --jsonl in.jsonl --out out.jsonl

All prompts share one engine, or with --ray several. Prompt i samples with stream i of the seed, so an answer
does not depend on which others are decoded beside it, nor on how often the run was cut off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from tqdm import tqdm

import fastdllm_ext
from fastdllm_ext.commands.batch import replicas
from fastdllm_ext.commands.cluster import add_cluster_arguments, check_cluster_arguments
from fastdllm_ext.commands.jobs import (
    AHEAD,
    REFUSALS,
    Answer,
    Answers,
    Asker,
    Facts,
    Job,
    answer_of,
    failure,
    make_jobs,
)
from fastdllm_ext.commands.opening import (
    add_model_arguments,
    add_settings_arguments,
    ending,
    open_engine,
)
from fastdllm_ext.commands.prompts import Asked, add_prompt_arguments, read_prompts
from fastdllm_ext.commands.record import Record
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine import EngineStats, Request
from fastdllm_ext.patching.registry import CHOICES
from fastdllm_ext.view import visible

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_prompt_arguments(parser)
    group = parser.add_argument_group("answers")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--json", action="store_true", help="an object a line on stdout, in place of text")
    where.add_argument(
        "--out", type=Path, metavar="FILE",
        help="append an object a line to FILE, as answers come; the same command again goes on where it "
        "stopped",
    )  # fmt: skip
    group.add_argument("--restart", action="store_true", help="begin --out anew")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_settings_arguments(parser)
    add_model_arguments(parser)
    group = parser.add_argument_group("engine")
    group.add_argument("--max-rows", type=int, default=64, help="answers that are decoded at once (64)")
    group.add_argument(
        "--num-pages", type=int, help="of 32 positions, for keys and values (as the engine chooses)"
    )
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answers; the exit status: 1 where some prompt has none, 130 after Ctrl-C.

    Raises:
        TypeError, ValueError, OSError: before anything is answered: prompts, settings or a model that are
            none.
        ImportError: --ray without Ray.
        ChildProcessError: a replica cannot answer anything.
    """
    check_cluster_arguments(arguments)
    if arguments.restart and arguments.out is None:
        raise ValueError("--restart: takes --out FILE")
    progress = Progress()
    with ending():
        try:
            return _run(arguments, progress)
        except KeyboardInterrupt:
            print(f"fastdllm-ext generate: stopped: {progress.text(arguments.out)}", file=sys.stderr)
            if arguments.out is not None:
                again = ", without --restart," if arguments.restart and progress.total else ""
                print(f"The same command{again} goes on.", file=sys.stderr)
            raise


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        total: prompts; 0 before they are known.
        answered, failed: of them, those of earlier runs included.
    """

    total: int = 0
    answered: int = 0
    failed: int = 0

    def add(self, answer: Answer) -> None:
        """Counts one."""
        if "error" in answer:
            self.failed += 1
        else:
            self.answered += 1

    def text(self, out: Path | None) -> str:
        """In a line."""
        if not self.total:
            return "nothing is answered yet"
        where = "" if out is None else f" in {out}"
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.answered} of {self.total} prompts answered{failed}{where}"


def _run(arguments: argparse.Namespace, progress: Progress) -> int:
    asked = read_prompts(arguments)
    with ExitStack() as stack:
        record = None
        if arguments.out is not None:
            record = stack.enter_context(Record(arguments.out, arguments.restart))
        sink = record or Printed([one.id for one in asked], arguments.json)
        opened = replicas if arguments.ray else one_engine
        facts, answers = stack.enter_context(opened(arguments))
        _check_chat(arguments, asked, facts)
        base, jobs = make_jobs(facts, asked, _seed_before(record))
        if record is not None:
            record.begin(run_of(facts, arguments, base))
            jobs = _left(jobs, record)
            for answer in record.answers.values():
                progress.add(answer)
        progress.total = len(asked)
        quiet = arguments.quiet or not sys.stderr.isatty()
        done = len(asked) - len(jobs)
        speed, begun = EngineStats(), perf_counter()
        with tqdm(total=len(asked), initial=done, unit="prompt", disable=quiet) as shown:
            for answer in answers(jobs):
                sink.add(answer)
                progress.add(answer)
                speed.tokens += answer.get("tokens", 0)
                speed.nfe += answer.get("nfe", 0)
                speed.busy_seconds = perf_counter() - begun
                shown.set_postfix_str(speed.summary, refresh=False)
                shown.update()
    if record is not None and not arguments.quiet:
        print(progress.text(arguments.out), file=sys.stderr)
    return 1 if progress.failed else 0


def _check_chat(arguments: argparse.Namespace, asked: Sequence[Asked], facts: Facts) -> None:
    if facts.has_chat:
        return
    wanting = "--chat" if arguments.chat else next((one.where for one in asked if one.is_chat), None)
    if wanting is not None:
        raise ValueError(f"{wanting}: the tokenizer of {arguments.model} has no chat template")


def _seed_before(record: Record | None) -> int | None:
    """The seed of the run that is gone on with."""
    before = None if record is None else record.before
    seed = None if before is None else before.get("settings", {}).get("seed")
    return seed if isinstance(seed, int) else None


def run_of(facts: Facts, arguments: argparse.Namespace, config: GenerationConfig) -> dict[str, Any]:
    """What answers depend on beside their prompts; ``model`` and ``fastdllm_ext`` are for the reader."""
    return {
        "model": arguments.model,
        "fastdllm_ext": fastdllm_ext.__version__,
        "weights": facts.weights,
        "tokenizer": facts.tokenizer,
        "dtype": facts.dtype,
        **{name: getattr(arguments, name) for name in CHOICES},
        "chat": arguments.chat,
        "settings": config.to_dict(),
    }


def _left(jobs: Sequence[Job], record: Record) -> list[Job]:
    """The jobs that are not answered. ValueError where the record answers something else."""
    unknown = record.answers.keys() - {job.asked.id for job in jobs}
    if unknown:
        raise ValueError(
            f"{record.path}: answers id {next(iter(unknown))!r}, which is none of the prompts; "
            "takes the same prompts, --restart, or another file"
        )
    left = []
    for job in jobs:
        answer = record.answers.get(job.asked.id)
        if answer is None:
            left.append(job)
        elif answer["hash"] != job.hash:
            raise ValueError(
                f"{job.asked.where}: is not what {record.path} answers as id {job.asked.id!r}; "
                "takes the same prompts, --restart, or another file"
            )
    return left


@contextmanager
def one_engine(arguments: argparse.Namespace) -> Iterator[tuple[Facts, Answers]]:
    """The engine of this process, open: its facts, and how it answers jobs."""
    with open_engine(arguments, max_rows=arguments.max_rows, num_pages=arguments.num_pages) as engine:
        yield Facts.of(engine), partial(answers, Asker(engine, arguments.chat))


def answers(asker: Asker, jobs: Sequence[Job]) -> Iterator[Answer]:
    """Answers as they come; a prompt that cannot have one gets an ``error``. Submits not far ahead.

    Raises:
        Whatever keeps more than one prompt from being answered.
    """
    left = iter(jobs)
    pending: dict[Request, Job] = {}
    while True:
        fresh = list(islice(left, AHEAD * asker.engine.max_rows - len(pending)))
        for job in fresh:
            try:
                pending[asker.submit(job)] = job
            except REFUSALS as error:
                yield failure(job, error)
        if not pending and not fresh:
            return
        wait([request.future for request in pending], return_when=FIRST_COMPLETED)
        for request in [request for request in pending if request.done]:
            job = pending.pop(request)
            try:
                yield answer_of(job, request.result())
            except ValueError as error:
                yield failure(job, error)


class Printed:
    """Answers on what is stdout now, in the order of the prompts.

    Args:
        ids: of the prompts.
        as_json: objects; else text, under headings where there are several.
    """

    def __init__(self, ids: Sequence[str | int], as_json: bool) -> None:
        self._left, self._as_json, self._several = deque(ids), as_json, len(ids) > 1
        self._held: dict[str | int, Answer] = {}
        self._out = sys.stdout

    def add(self, answer: Answer) -> None:
        """Prints the answer, once those before it are there, and those that waited for it."""
        self._held[answer["id"]] = answer
        while self._left and self._left[0] in self._held:
            self._print(self._held.pop(self._left.popleft()))

    def _print(self, answer: Answer) -> None:
        if self._as_json:
            self._write(json.dumps(answer, ensure_ascii=False), self._out)
        elif "error" in answer:
            self._write(f"fastdllm-ext generate: {answer['id']}: {answer['error']}", sys.stderr)
        else:
            end = "\n" if self._left else ""
            text = f"==> {answer['id']} <==\n{answer['text']}{end}" if self._several else answer["text"]
            self._write(visible(text, keep="\n\t") if self._out.isatty() else text, self._out)

    def _write(self, text: str, file: TextIO) -> None:
        tqdm.write(text, file=file)  # beside the bar
        file.flush()
