"""What a model is asked, and how its answers are graded: the demo model's problems, a file, lm-eval's tasks.

A task is a list of problems. Reports and calibration know nothing else of where they come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastdllm_ext.demo_tasks import held_out

__all__ = ["Problem", "Task", "open_task"]


@dataclass(frozen=True)
class Problem:
    """A prompt, and what an answer to it is worth.

    Attributes:
        prompt: text, as the tokenizer gets it.
        grade: of an answer's text, from 0 to 1.
        until: strings that end an answer, themselves not part of it.
        family: the kind of problem, by which results may be grouped.
    """

    prompt: str
    grade: Callable[[str], float]
    until: tuple[str, ...] = ()
    family: str = ""

    def score(self, text: str) -> float:
        """The grade of an answer, cut where a string of ``until`` begins."""
        return float(
            self.grade(text[: min((i for s in self.until if (i := text.find(s)) >= 0), default=None)])
        )


@dataclass(frozen=True)
class Task:
    """Problems, and how they are to be spoken of.

    Attributes:
        name: as it was asked for.
        metric: what a grade is, in words.
        problems: in an order that a shorter list of the same task begins with.
    """

    name: str
    metric: str
    problems: list[Problem]


def open_task(
    name: str,
    limit: int,
    *,
    seed: int = 0,
    shots: int | None = None,
    chat: Callable[[str], str] | None = None,
    metric: str | None = None,
    include_path: str | None = None,
    run_unsafe_code: bool = False,
) -> Task:
    """The first ``limit`` problems of a task.

    Args:
        name: ``demo``, the held-out problems of the bundled model; a path that ends in ``.jsonl``, each line
            an object with ``prompt`` and ``answer`` (graded by equality, blanks around it apart) and perhaps
            ``until`` and ``family``; or a task of lm-evaluation-harness (extra ``[eval]``): ``gsm8k``.
        limit: problems at most.
        seed: which problems of ``demo``; the examples of an lm-eval task.
        shots: worked examples before each prompt, of an lm-eval task; None is the task's own number.
        chat: wraps a prompt in a chat template; None asks it as it is.
        metric: of an lm-eval task, as it names them, with its filter: ``exact_match,flexible-extract``. None
            is its first.
        include_path: folder of further tasks of lm-eval.
        run_unsafe_code: the task may run code that the model wrote, on this machine.

    Raises:
        ValueError: no such task, none of its problems, or an argument out of range. OSError: no such file.
        ImportError: an lm-eval task, and lm-eval is not installed.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}; takes 1 or more")
    if name != "demo" and not name.endswith(".jsonl"):
        return _lm_eval_task(name, limit, seed, shots, chat, metric, include_path, run_unsafe_code)
    if shots or metric:
        raise ValueError(
            f"shots={shots}, metric={metric!r}: task {name!r} has neither; are of lm-eval's tasks"
        )
    if name == "demo":
        problems = [Problem(p.prompt, _equals(p.answer), (), p.family) for p in held_out(limit, seed)]
    else:
        problems = _read_lines(Path(name), limit)
    if chat is not None:
        problems = [Problem(chat(p.prompt), p.grade, p.until, p.family) for p in problems]
    return Task(name, "exact match of the whole answer", problems)


def _equals(answer: str) -> Callable[[str], float]:
    return lambda text: float(text.strip() == answer.strip())


def _read_lines(path: Path, limit: int) -> list[Problem]:
    problems: list[Problem] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if len(problems) == limit:
            break
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}; takes one JSON object a line") from error
        known = {"prompt": str, "answer": str, "until": list, "family": str}
        missing = [key for key in ("prompt", "answer") if not isinstance(values, dict) or key not in values]
        if missing:
            raise ValueError(f"{path}, line {number}: no {missing[0]!r}; takes 'prompt' and 'answer'")
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{path}, line {number}: unknown {key!r}; takes {', '.join(known)}")
            if not isinstance(value, known[key]):
                raise ValueError(f"{path}, line {number}: {key}={value!r}; takes a {known[key].__name__}")
        until = tuple(values.get("until", ()))
        problems.append(Problem(values["prompt"], _equals(values["answer"]), until, values.get("family", "")))
    if not problems:
        raise ValueError(f"{path}: holds no problem; takes one JSON object a line")
    return problems


@lru_cache(maxsize=4)  # it reads thousands of files
def _task_manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _lm_eval_task(
    name: str,
    limit: int,
    seed: int,
    shots: int | None,
    chat: Callable[[str], str] | None,
    metric: str | None,
    include_path: str | None,
    run_unsafe_code: bool,
) -> Task:
    try:
        manager = _task_manager(include_path)
    except ImportError as error:
        raise ImportError(
            f"task {name!r} is one of lm-evaluation-harness's: pip install 'fastdllm_ext[eval]'; without it "
            "there are 'demo' and files that end in .jsonl"
        ) from error
    if name not in manager.all_tasks:
        raise ValueError(
            f"task {name!r} is unknown; takes 'demo', a file ending in .jsonl, or a task of lm-eval"
        )
    found = manager.load(name)
    task: Any = found["tasks"].get(name)
    if task is None or task.OUTPUT_TYPE != "generate_until":
        kind = "a group" if task is None else f"of type {task.OUTPUT_TYPE}"
        raise ValueError(f"task {name!r} is {kind}; takes one whose type is generate_until")
    if getattr(task, "UNSAFE_CODE", False) and not run_unsafe_code:
        raise ValueError(
            f"task {name!r} runs code that the model wrote; takes --confirm-run-unsafe-code, at your own risk"
        )
    if shots is not None:
        task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    metrics = [f"{m},{ensemble.name}" for ensemble in task._filters for m in task._metric_fn_list]
    if metric is None:
        metric = metrics[0]
    if metric not in metrics:
        raise ValueError(f"metric={metric!r}; task {name!r} has {', '.join(metrics)}")
    problems = [_instance_problem(task, instance, metric, chat) for instance in task.instances]
    if not problems:
        raise ValueError(f"task {name!r} has no problem")
    return Task(name, metric, problems)


def _instance_problem(task: Any, instance: Any, metric: str, chat: Callable[[str], str] | None) -> Problem:
    context, settings = instance.args
    until = settings.get("until") or ()
    quantity, _, chosen = metric.partition(",")
    ensemble = next(e for e in task._filters if e.name == chosen)

    def grade(text: str) -> float:
        instance.resps = [text]
        ensemble.apply([instance])
        return float(task.process_results(instance.doc, [instance.filtered_resps[chosen]])[quantity])

    strings: Sequence[str] = [until] if isinstance(until, str) else until
    return Problem(chat(context) if chat else context, grade, tuple(strings), task.task_name)
