"""`fastdllm-ext generate`: answers to prompts, one or a file of them.

    fastdllm-ext generate MODEL --jsonl in.jsonl --out out.jsonl

All prompts share one engine. Prompt i samples with stream i of the seed, so an answer does not depend on
which others are decoded beside it, nor on how often the run was cut off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from jinja2 import TemplateError
from tqdm import tqdm

import fastdllm_ext
from fastdllm_ext.arguments import row_seeds
from fastdllm_ext.commands import fingerprint
from fastdllm_ext.commands.opening import (
    add_model_arguments,
    add_settings_arguments,
    check_for_model,
    ending,
    open_engine,
)
from fastdllm_ext.commands.prompts import Asked, add_prompt_arguments, read_prompts
from fastdllm_ext.commands.record import Record
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine import Completion, Engine, Request
from fastdllm_ext.patching.registry import CHOICES
from fastdllm_ext.serve.text import Speech
from fastdllm_ext.view import visible

__all__ = ["add_arguments", "run"]

Answer = dict[str, Any]


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


def run(arguments: argparse.Namespace) -> int:
    """Answers; the exit status: 1 where some prompt has none, 130 after Ctrl-C.

    Raises:
        TypeError, ValueError, OSError: before anything is answered: prompts, settings or a model that are
            none.
    """
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


@dataclass(frozen=True)
class Job:
    """A prompt with all that its answer depends on.

    Attributes:
        asked: as it was given.
        config, stream: as the engine takes them.
    """

    asked: Asked
    config: GenerationConfig
    stream: int

    @property
    def hash(self) -> str:
        """Of what was asked."""
        asked = self.asked
        return fingerprint.of_values(asked.prompt, asked.others, self.config.to_dict(), self.stream)


def _run(arguments: argparse.Namespace, progress: Progress) -> int:
    asked = read_prompts(arguments)
    with ExitStack() as stack:
        record = None
        if arguments.out is not None:
            record = stack.enter_context(Record(arguments.out, arguments.restart))
        engine = stack.enter_context(
            open_engine(arguments, max_rows=arguments.max_rows, num_pages=arguments.num_pages)
        )
        speech = Speech(engine.tokenizer, engine.geometry.eos_ids)
        _check_chat(arguments, asked, speech)
        base, jobs = make_jobs(engine, asked, _seed_before(record))
        if record is not None:
            record.begin(facts_of(engine, arguments, base))
            jobs = _left(jobs, record)
            for answer in record.answers.values():
                progress.add(answer)
        progress.total = len(asked)
        sink = record or Printed([one.id for one in asked], arguments.json)
        quiet = arguments.quiet or not sys.stderr.isatty()
        done = len(asked) - len(jobs)
        with tqdm(total=len(asked), initial=done, unit="prompt", disable=quiet) as shown:
            for answer in answers(engine, speech, jobs, arguments.chat):
                sink.add(answer)
                progress.add(answer)
                shown.set_postfix_str(engine.stats.summary, refresh=False)
                shown.update()
    if record is not None and not arguments.quiet:
        print(progress.text(arguments.out), file=sys.stderr)
    return 1 if progress.failed else 0


def _check_chat(arguments: argparse.Namespace, asked: Sequence[Asked], speech: Speech) -> None:
    if speech.has_chat:
        return
    wanting = "--chat" if arguments.chat else next((one.where for one in asked if one.is_chat), None)
    if wanting is not None:
        raise ValueError(f"{wanting}: the tokenizer of {arguments.model} has no chat template")


def _seed_before(record: Record | None) -> int | None:
    """The seed of the run that is gone on with."""
    before = None if record is None else record.before
    seed = None if before is None else before.get("settings", {}).get("seed")
    return seed if isinstance(seed, int) else None


def make_jobs(engine: Engine, asked: Sequence[Asked], seed: int | None) -> tuple[GenerationConfig, list[Job]]:
    """The settings of prompts that have none of their own, and every prompt's job.

    Args:
        engine: of whose config the prompts' own settings are an addition.
        asked: the prompts.
        seed: where none is given; None draws one, if anything is sampled.

    Raises:
        ValueError: a prompt's settings are none, or none for the model.
    """
    configs = [_config_of(engine, one) for one in asked]
    if seed is None:  # drawn; 0 where nothing is sampled
        seed = next(filter(None, (row_seeds(c, 1)[0][0] for c in configs if c.seed is None)), 0)

    def seeded(config: GenerationConfig) -> GenerationConfig:
        return replace(config, seed=seed) if config.seed is None else config

    base = seeded(engine.config)
    return base, [
        Job(
            one,
            seeded(config) if one.settings else base,
            # A seed of its own means what it means to a generation of this prompt alone.
            index if one.settings.get("seed") is None else 0,
        )
        for index, (one, config) in enumerate(zip(asked, configs, strict=True))
    ]


def _config_of(engine: Engine, one: Asked) -> GenerationConfig:
    if not one.settings:
        return engine.config
    try:
        config = GenerationConfig.build(engine.config, one.settings)
        check_for_model(engine.model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{one.where}: {error}") from error
    return config


def facts_of(engine: Engine, arguments: argparse.Namespace, config: GenerationConfig) -> dict[str, Any]:
    """What answers depend on beside their prompts; ``model`` and ``fastdllm_ext`` are for the reader."""
    return {
        "model": arguments.model,
        "fastdllm_ext": fastdllm_ext.__version__,
        "weights": fingerprint.of_model(engine.model),
        "tokenizer": fingerprint.of_tokenizer(engine.tokenizer),
        "dtype": str(next(engine.model.parameters()).dtype).removeprefix("torch."),
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


def answers(engine: Engine, speech: Speech, jobs: Sequence[Job], chat: bool) -> Iterator[Answer]:
    """Answers as they come; a prompt that cannot have one gets an ``error``. Submits not far ahead.

    Raises:
        Whatever keeps more than one prompt from being answered.
    """
    left = iter(jobs)
    pending: dict[Request, Job] = {}
    while True:
        fresh = list(islice(left, 2 * engine.max_rows - len(pending)))
        for job in fresh:
            try:
                ids = encode(speech, job.asked, chat)
                pending[engine.submit(ids, config=job.config, stream=job.stream)] = job
            except (TemplateError, TypeError, ValueError) as error:
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


def encode(speech: Speech, asked: Asked, chat: bool) -> list[int]:
    """A prompt as token ids. jinja2.TemplateError where the chat template refuses it."""
    prompt: Any = asked.prompt
    if isinstance(prompt, str) and chat:
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, str):
        return speech.encode(prompt, special=True)
    elif not asked.is_chat:
        return list(prompt)
    return speech.encode(speech.chat(prompt), special=False)


def answer_of(job: Job, completion: Completion) -> Answer:
    """A completion as an object. Its seconds are those of its decoding, without its wait."""
    return {
        "id": job.asked.id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_length,
        "tokens": len(completion.tokens),
        "nfe": completion.nfe,
        "seconds": round(completion.seconds - completion.queue_seconds, 6),
        "hash": job.hash,
        **job.asked.others,
    }


def failure(job: Job, error: Exception) -> Answer:
    """What stands in an answer's place."""
    return {"id": job.asked.id, "error": str(error), "hash": job.hash, **job.asked.others}


class Printed:
    """Answers on stdout, in the order of the prompts.

    Args:
        ids: of the prompts.
        as_json: objects; else text, under headings where there are several.
    """

    def __init__(self, ids: Sequence[str | int], as_json: bool) -> None:
        self._left, self._as_json, self._several = deque(ids), as_json, len(ids) > 1
        self._held: dict[str | int, Answer] = {}

    def add(self, answer: Answer) -> None:
        """Prints the answer, once those before it are there, and those that waited for it."""
        self._held[answer["id"]] = answer
        while self._left and self._left[0] in self._held:
            self._print(self._held.pop(self._left.popleft()))

    def _print(self, answer: Answer) -> None:
        if self._as_json:
            self._write(json.dumps(answer, ensure_ascii=False))
        elif "error" in answer:
            self._write(f"fastdllm-ext generate: {answer['id']}: {answer['error']}", sys.stderr)
        else:
            end = "\n" if self._left else ""
            text = f"==> {answer['id']} <==\n{answer['text']}{end}" if self._several else answer["text"]
            self._write(visible(text, keep="\n\t") if sys.stdout.isatty() else text)

    def _write(self, text: str, file: TextIO | None = None) -> None:
        file = file or sys.stdout
        tqdm.write(text, file=file)  # beside the bar
        file.flush()
