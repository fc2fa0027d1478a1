"""Processes that take an engine's turns together, each with a part of the model (``shards.py``).

The first is the engine's own; the others follow it. Which turn is next depends on what came, what was given
up, and what the model made of it. The first two they are told before each turn; of the third all see the same
bits.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastdllm_ext.engine.request import Request
from fastdllm_ext.engine.scheduler import make_scheduler
from fastdllm_ext.forward import evaluating
from fastdllm_ext.patching.registry import patched_family, patched_options, unwrapped
from fastdllm_ext.runtime import Fused, choose_runtime
from fastdllm_ext.shards import split, why_not_split

__all__ = ["Team", "TeamFailed"]

PATIENCE = 10.0  # seconds that a process gets to end in

Opener = Callable[[], tuple[Any, Any]]


class TeamFailed(RuntimeError):
    """A process of the group has ended; what the others wait for does not come."""


@dataclass(frozen=True)
class Place:
    """Of a process in its team.

    Attributes:
        rank, size: it is one of so many.
        device: "cpu" or "cuda", of which it takes the one with its rank.
        folder: where all find one another.
    """

    rank: int
    size: int
    device: str
    folder: str

    def take(self, model: nn.Module) -> None:
        """Waits for the others, and keeps what of the model is this process's."""
        from torch.distributed import FileStore  # type: ignore[attr-defined]
        from torch.distributed.device_mesh import init_device_mesh

        if self.device == "cuda":
            torch.cuda.set_device(self.rank)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are of one machine
        store = FileStore(str(Path(self.folder, "store")), self.size)
        backend = "nccl" if self.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        own = unwrapped(model)
        split(patched_family(model).parts(own), init_device_mesh(self.device, (self.size,)))


class Team:
    """A model over several processes.

    Args:
        open_model: gives (model, tokenizer), the model patched and on the CPU; picklable, for each process
            calls it.
        size: processes, 2 or more.
        device: "cpu", or "cuda": as many GPUs.

    Attributes:
        model, tokenizer: for an engine whose ``team`` this is, and for nothing else.

    Raises:
        ValueError: the model cannot be split over so many, or there are not so many GPUs.
        RuntimeError: this process is in a process group of torch's already.
        TeamFailed: a process could not open the model.
        Whatever ``open_model`` raises.
    """

    def __init__(self, open_model: Opener, size: int, device: str) -> None:
        if device == "cuda" and torch.cuda.device_count() < size:
            raise ValueError(
                f"size={size}; takes {torch.cuda.device_count()}, the GPUs that are here, at most"
            )
        if dist.is_initialized():
            raise RuntimeError("this process is in a process group already")
        if device == "cpu":  # the processes share its cores
            torch.set_num_threads(max(1, torch.get_num_threads() // size))
        self._on_failure: Callable[[BaseException], None] = lambda _: None
        self._closing = False
        self._folder = tempfile.TemporaryDirectory(prefix="fastdllm-")
        places = [Place(rank, size, device, self._folder.name) for rank in range(size)]
        self._followers = [_Follower(place, open_model) for place in places[1:]]
        try:
            self.model, self.tokenizer = open_model()
            self._check(size)
            for follower in self._followers:
                follower.wait()
            places[0].take(self.model)
        except BaseException:
            for follower in self._followers:
                follower.process.kill()
            self.close()
            raise

    def start(self, on_failure: Callable[[BaseException], None], **settings: Any) -> None:
        """The engine begins: :func:`make_scheduler` with these settings, in every process."""
        self._on_failure = on_failure
        self._tell(settings)
        for follower in self._followers:
            threading.Thread(target=self._watch, args=(follower,), daemon=True).start()

    def tell(self, arrived: Sequence[Request], gone: Collection[int]) -> None:
        """Before a turn: requests that came, and the numbers of those that were given up."""
        self._tell((tuple((request.number, request.row, request.common) for request in arrived), gone))

    def close(self) -> None:
        """Ends the processes."""
        if self._closing:
            return
        self._closing = True
        self._tell(None)
        for follower in self._followers:
            follower.end()
        whole = all(follower.process.returncode == 0 for follower in self._followers)
        if dist.is_initialized() and (whole or dist.get_backend() == "gloo"):
            dist.destroy_process_group()  # of NCCL's it would wait for one that is gone
        self._folder.cleanup()

    def _tell(self, message: object) -> None:
        for follower in self._followers:
            with suppress(OSError):  # of one that has ended, which is watched for
                send(follower.connection, message)

    def _check(self, size: int) -> None:
        family, own = patched_family(self.model), unwrapped(self.model)
        parts, options = family.parts(own), patched_options(self.model)
        reason = why_not_split(family.geometry(own), parts, size)
        if reason is not None:
            raise ValueError(f"size={size}: {reason}")
        if choose_runtime(options, family, parts) is not Fused:
            raise ValueError(f"size={size}: takes a model that runtime='fused' takes")

    def _watch(self, follower: _Follower) -> None:
        status = follower.process.wait()
        if not self._closing:
            self._on_failure(TeamFailed(f"process {follower.rank} of the model ended with status {status}"))


class _Follower:
    """A process, from the outside."""

    def __init__(self, place: Place, open_model: Opener) -> None:
        self.rank = place.rank
        self.connection, theirs = Pipe()
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())} if place.device == "cpu" else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import follow; follow({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        send(self.connection, (place, open_model))

    def wait(self) -> None:
        """Until it has opened the model. TeamFailed where it cannot."""
        with suppress(EOFError, OSError):
            if (error := receive(self.connection)) is None:
                return
            raise TeamFailed(f"process {self.rank} of the model: {error}")
        raise TeamFailed(f"process {self.rank} of the model ended with status {self.process.wait()}")

    def end(self) -> None:
        """Waits for its end, not for long."""
        self.connection.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def follow(descriptor: int) -> None:
    """What a process does whose leader is at the other end of a connection."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's, a service manager's: the leader says when
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    place, open_model = receive(connection)
    try:
        model, _ = open_model()
    except Exception as error:
        send(connection, f"{type(error).__name__}: {error}")
        raise
    send(connection, None)
    place.take(model)
    messages = _messages(connection)
    settings = next(messages, None)
    if settings is not None:
        scheduler = make_scheduler(unwrapped(model), decode=lambda _: None, together=True, **settings)
        with evaluating(model):
            for arrived, gone in messages:
                requests = [Request(number, row, common, False, _nobody) for number, row, common in arrived]
                scheduler.begin(requests, gone)
                if not scheduler.idle:
                    scheduler.turn()
    dist.destroy_process_group()


def _nobody() -> None:
    """Waits for what a follower's requests come to."""


def _messages(connection: Connection) -> Iterator[Any]:
    """What the leader says, until it says None."""
    said: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        try:
            while (message := receive(connection)) is not None:
                said.put(message)
        except BaseException as error:
            if not isinstance(error, (EOFError, OSError)):
                traceback.print_exc()
            os._exit(1)  # the rest of this may wait for the leader in the middle of a forward
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    return iter(said.get, None)


def send(connection: Connection, message: object) -> None:
    """By value: a connection's own ``send`` shares the memory of tensors, among relatives."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """What :func:`send` sent."""
    return pickle.loads(connection.recv_bytes())
