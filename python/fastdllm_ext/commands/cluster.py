"""Replicas of a model on a Ray cluster: what commands with ``--ray`` have in common.

Importing this does not import Ray.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch

from fastdllm_ext.checks import check_count
from fastdllm_ext.commands.opening import option

__all__ = ["actor_options", "add_cluster_arguments", "check_cluster_arguments", "cluster"]

NEEDS = "--ray needs Ray: pip install 'fastdllm_ext[ray]'"
OF_RAY = ("ray_address", "replicas", "max_replicas", "cpus_per_replica")


# fmt: off
def add_cluster_arguments(parser: argparse.ArgumentParser, *, grows: bool = False) -> None:
    """``--ray``, and what it takes.

    Args:
        grows: there may be more replicas at times.
    """
    add = parser.add_argument_group("Ray", "The model on several GPUs or machines.").add_argument
    add("--ray", action="store_true", help="decode in replicas on a Ray cluster")
    add("--ray-address", metavar="ADDRESS",
        help="of a cluster that runs: auto, HOST:PORT, ray://HOST:PORT (RAY_ADDRESS; without it, this "
        "machine is one)")
    add("--replicas", type=int, metavar="N", help="engines, each with a model of its own (1)")
    if grows:
        add("--max-replicas", type=int, metavar="N", help="start as many where answers wait (--replicas)")
    add("--cpus-per-replica", type=int, metavar="N",
        help="cores, as Ray counts them, and threads (of this machine its share; elsewhere 1)")
# fmt: on


def check_cluster_arguments(arguments: argparse.Namespace) -> None:
    """Of a command with or without ``--ray``.

    Raises:
        ImportError: ``--ray`` without Ray.
        TypeError, ValueError: an argument out of range, or without ``--ray``.
    """
    for name in OF_RAY:
        value = getattr(arguments, name, None)
        if value is not None and not arguments.ray:
            raise ValueError(f"{option(name)}={value}; takes --ray too")
        if value is not None and name != "ray_address":
            check_count(option(name), value)
    if _most(arguments) < _replicas(arguments):
        raise ValueError(f"--max-replicas={_most(arguments)}; takes {_replicas(arguments)} or more")
    if arguments.ray and find_spec("ray") is None:
        raise ImportError(NEEDS)


@contextmanager
def cluster(arguments: argparse.Namespace, quiet: bool = False) -> Iterator[None]:
    """Connected to the cluster that the arguments name, or to this machine as one, which ends with it.

    Args:
        arguments: of :func:`add_cluster_arguments`.
        quiet: nothing of what Ray and its processes say about themselves is shown, but what goes wrong, on
            stderr.

    Raises:
        ConnectionError: no cluster at the address.
    """
    import ray

    options: dict[str, Any] = {}
    if quiet:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = arguments.ray_address or os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Of Ray's own account: it starts nothing for which there are too few.
        needed = _most(arguments) * _cpus(arguments, local=True)
        options |= {"num_cpus": max(_cores(), needed), "include_dashboard": False}
    with _muted() if quiet else nullcontext():  # it says that it will say nothing
        ray.init(address or "local", **options)
    try:
        # On stdout, where answers are, Ray tells of processes that died.
        with redirect_stdout(sys.stderr) if quiet else nullcontext():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _muted() -> Iterator[None]:
    """Without what this process's libraries write on stderr."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def actor_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What Ray is asked for, for one replica on the cluster that this is connected to."""
    import ray

    of_cluster = ray.cluster_resources()
    is_local = arguments.ray_address is None and "RAY_ADDRESS" not in os.environ
    gpus = 0
    if of_cluster.get("GPU", 0) and torch.device(_device(arguments)).type == "cuda":
        gpus = arguments.tensor_parallel_size
    cpus = arguments.cpus_per_replica or (1 if gpus else _cpus(arguments, is_local))
    threads = {"OMP_NUM_THREADS": str(cpus)} | ({} if gpus else {"OMP_WAIT_POLICY": "passive"})
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": threads}}


def _device(arguments: argparse.Namespace) -> str:
    """Of a replica. What it is "auto" on is for the machine to say that it runs on; with GPUs, it is one."""
    return "cuda" if arguments.device == "auto" else str(arguments.device)


def _replicas(arguments: argparse.Namespace) -> int:
    return int(arguments.replicas or 1)


def _most(arguments: argparse.Namespace) -> int:
    return int(getattr(arguments, "max_replicas", None) or _replicas(arguments))


def _cpus(arguments: argparse.Namespace, local: bool) -> int:
    share = max(1, _cores() // _most(arguments)) if local else 1
    return int(arguments.cpus_per_replica or share)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
