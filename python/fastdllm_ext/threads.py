"""How the threads of an operation wait for one another."""

from __future__ import annotations

import os
import sys

import torch

__all__ = ["let_threads_sleep"]

POLICY = "OMP_WAIT_POLICY"


def let_threads_sleep() -> None:
    """Starts the program anew, once, such that threads which wait on a CPU sleep.

    They spin as long as nobody says otherwise, which is quickest where every thread has a core to itself. In
    a server they have not: whenever the event loop or another process takes a core, the others burn theirs
    until it comes back, at every operation. OpenMP reads how to wait when it is loaded: now it is too late.
    """
    if torch.cuda.is_available() or os.name != "posix" or POLICY in os.environ:
        return
    os.execve(sys.executable, sys.orig_argv, {**os.environ, POLICY: "passive"})
