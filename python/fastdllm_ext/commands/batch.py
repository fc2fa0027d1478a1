"""Jobs answered by replicas of an engine on a Ray cluster, through Ray Data.

A row of the dataset is a few jobs, and a task of a replica. A replica has as many tasks in hand as keep its
engine's rows full, so no job waits for the end of another, and what a task answers comes back at once.
Importing this does not import Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastdllm_ext.commands.cluster import actor_options, cluster
from fastdllm_ext.commands.jobs import AHEAD, REFUSALS, Answer, Answers, Asker, Facts, Job, answer_of, failure
from fastdllm_ext.commands.opening import check_limits, open_engine

__all__ = ["Replica", "replicas"]

PER_TASK = 8  # tasks for each that an engine's rows are full of
RESTARTS = 3  # of a replica's process; one that ends more often than that does not get far


@contextmanager
def replicas(arguments: argparse.Namespace) -> Iterator[tuple[Facts, Answers]]:
    """Replicas on the cluster of the arguments: the facts of their engines, and how they answer jobs.

    The facts are found on a CPU of the cluster: this process needs neither the model's memory nor its files.

    Raises:
        ValueError: a model or settings that are none.
        ConnectionError: no cluster at the address.
    """
    check_limits(arguments, **_limits(arguments))
    with cluster(arguments, quiet=True):
        import ray

        options = actor_options(arguments) | {"num_gpus": 0, "max_calls": 1}
        facts = ray.get(ray.remote(**options)(facts_on_cpu).remote(arguments))
        if isinstance(facts, str):
            raise ValueError(facts)
        yield facts, partial(answers, arguments)


def facts_on_cpu(arguments: argparse.Namespace) -> Facts | str:
    """Of the engine that the arguments describe, wherever it will be; or why there is none."""
    on_cpu = argparse.Namespace(**{**vars(arguments), "device": "cpu", "tensor_parallel_size": 1})
    try:
        with open_engine(on_cpu, max_rows=1, num_pages=1) as engine:
            return Facts.of(engine)
    except Exception as error:
        return _told(error)


def answers(arguments: argparse.Namespace, jobs: Sequence[Job]) -> Iterator[Answer]:
    """Answers as they come, one for each job.

    Raises:
        ChildProcessError: a replica cannot open its engine, or the engine has failed; its process ends again
            and again.
    """
    if not jobs:
        return
    left = {job.asked.id for job in jobs}
    for row in _answered(arguments, jobs):
        if row["failure"]:
            raise ChildProcessError(f"a replica: {row['failure']}")
        for answer in json.loads(row["answers"]):
            if answer["id"] in left:  # what was asked again after a replica's end may come twice
                left.remove(answer["id"])
                yield answer
    if left:
        raise ChildProcessError(f"Ray: no answer to {len(left)} prompts")


def _answered(arguments: argparse.Namespace, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """What the replicas make of jobs."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    count = arguments.replicas or 1
    size = task_size(len(jobs), count, arguments.max_rows)
    tasks = [{"jobs": pickle.dumps(jobs[at : at + size])} for at in range(0, len(jobs), size)]
    # No more than its share, or the replica that is there first takes all of a short run.
    at_once = min(-(-AHEAD * arguments.max_rows // size), -(-len(tasks) // count))
    rows = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    replica: Any = Replica
    with warnings.catch_warnings():
        # Ray 2.60 would rather have the two limits elsewhere.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = rows.map(
            replica,
            fn_constructor_args=[arguments],
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=at_once),
            max_concurrency=at_once,
            max_restarts=RESTARTS,
            **actor_options(arguments),
        )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for told, why in zip(batch["answers"], batch["failure"], strict=True):
                yield {"answers": told, "failure": why}
    except ray.exceptions.RayActorError as error:
        raise ChildProcessError("a replica: its process has ended too often; Ray's logs say why") from error
    except ray.exceptions.RayError as error:
        raise ChildProcessError(f"Ray: {str(error).strip().splitlines()[-1]}") from error


def task_size(jobs: int, replicas: int, max_rows: int) -> int:
    """Jobs of a task: one, where there are few of them; else as many as cost Ray little.

    A task's answers come when all of them are there, and those of few jobs are to be shared out evenly.
    """
    return max(1, min(max_rows // PER_TASK, jobs // (replicas * AHEAD * max_rows)))


class Replica:
    """A process of Ray's with an engine.

    What goes wrong comes back as text, for Ray would tell it with all that lies between.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._failure: Exception | None = None
        try:
            self._asker = Asker(open_engine(arguments, **_limits(arguments)), arguments.chat)
        except Exception as error:
            self._failure = error

    async def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Answers a row's jobs."""
        try:
            if self._failure is not None:
                raise self._failure
            found = await asyncio.gather(*map(self._answer, pickle.loads(row["jobs"])))
            return {"answers": json.dumps(found), "failure": ""}
        except Exception as error:
            return {"answers": "[]", "failure": _told(error)}

    async def _answer(self, job: Job) -> Answer:
        try:
            request = self._asker.submit(job)
            return answer_of(job, await asyncio.wrap_future(request.future))
        except REFUSALS as error:
            return failure(job, error)


def _limits(arguments: argparse.Namespace) -> dict[str, int | None]:
    return {"max_rows": arguments.max_rows, "num_pages": arguments.num_pages}


def _told(error: Exception) -> str:
    """An error in words: as a command tells it, which for others than these begins with its kind."""
    expected = isinstance(error, (ImportError, OSError, TypeError, ValueError))
    return str(error) if expected else f"{type(error).__name__}: {error}"
