"""`fastdllm-ext serve`: its arguments."""

from __future__ import annotations

import argparse
import math
import os
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from fastdllm_ext.checks import check_count, check_number
from fastdllm_ext.commands.cluster import add_cluster_arguments, check_cluster_arguments, cluster
from fastdllm_ext.commands.opening import add_model_arguments, add_settings_arguments, open_engine, option
from fastdllm_ext.serve import NEEDS

__all__ = ["add_arguments", "run"]

LEVELS = ("debug", "info", "warning", "error")
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
ENGINE_LIMITS = ("num_pages", "max_rows", "max_queue")


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model_arguments(parser)
    add_settings_arguments(parser)
    add_cluster_arguments(parser, grows=True)
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    add("--port", type=int, default=8000, help="0 takes one that is free (8000)")
    add("--served-model-name", metavar="NAME",
        help="that requests give as 'model' (MODEL; of a folder its name)")
    add("--api-key", metavar="KEY",
        help="that requests bear; better as FASTDLLM_API_KEY, which no list of processes shows")
    add("--allowed-host", action="append", default=[], metavar="NAME",
        help="of this machine in Host; may be repeated. A server without a key at a loopback address "
        "takes the loopback's names alone")
    add = parser.add_argument_group("limits").add_argument
    add("--num-pages", type=int,
        help="of 32 positions, for keys and values; of each replica (as the engine chooses)")
    add("--max-rows", type=int, default=64, help="answers that are decoded at once, by each replica (64)")
    add("--max-queue", type=int, default=256,
        help="answers that may wait, for all replicas together; more is status 429 (256)")
    add("--max-n", type=int, default=128, help="answers of a request, prompts times n (128)")
    add("--max-body-bytes", type=int, default=4 << 20, help="of a request (4 MiB)")
    add("--request-timeout", type=float, default=600, metavar="SECONDS",
        help="for an answer, its waiting included (600)")
    add("--shutdown-timeout", type=float, default=30, metavar="SECONDS",
        help="for running requests, after SIGTERM or SIGINT (30)")
    add = parser.add_argument_group("logs").add_argument
    add("--log-level", choices=LEVELS, default="info", help="(info)")
    add("--log-json", action="store_true", help="a JSON object a line")
    add("--log-prompts", action="store_true", help="write what is asked and answered into the log")
# fmt: on


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal comes; the exit status, 1 where the model cannot be loaded.

    Raises:
        ImportError: without the packages that it needs.
        OSError: an address that cannot be listened at.
        TypeError, ValueError: an argument out of range.
    """
    if any(find_spec(name) is None for name in PACKAGES):
        raise ImportError(NEEDS)
    from fastdllm_ext.serve.app import create_app
    from fastdllm_ext.serve.gate import Access, is_loopback
    from fastdllm_ext.serve.logs import configure
    from fastdllm_ext.serve.process import Server, listen
    from fastdllm_ext.serve.replicas import open_replicas
    from fastdllm_ext.serve.service import Limits, Service

    key = _checked(arguments)
    configure(arguments.log_level, arguments.log_json)
    limits = Limits(arguments.max_body_bytes, arguments.max_n, arguments.request_timeout)
    service = Service(_name(arguments), limits, log_texts=arguments.log_prompts)
    guarded = key is None and is_loopback(arguments.host)
    hosts = [arguments.host, *arguments.allowed_host] if guarded or arguments.allowed_host else None
    server = Server(create_app(service, Access(key, hosts)), service, arguments.shutdown_timeout)
    engine_limits = {name: getattr(arguments, name) for name in ENGINE_LIMITS}
    opening = partial(open_replicas if arguments.ray else open_engine, arguments, **engine_limits)
    listener = listen(arguments.host, arguments.port)
    # Ray's own processes end with the thread that starts them.
    with cluster(arguments, quiet=True) if arguments.ray else nullcontext():
        status = server.serve_on(listener, opening)
    return server.leave(status)


def _checked(arguments: argparse.Namespace) -> str | None:
    """The API key. TypeError or ValueError for an argument out of range."""
    check_cluster_arguments(arguments)
    for name in (*ENGINE_LIMITS, "max_n", "max_body_bytes"):
        if getattr(arguments, name) is not None:
            check_count(option(name), getattr(arguments, name))
    for name in ("request_timeout", "shutdown_timeout"):
        check_number(option(name), getattr(arguments, name), "above 0", 0, math.inf)
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port={arguments.port}; takes 0 to 65535")
    key: str | None = arguments.api_key
    if key is None:
        key = os.environ.get("FASTDLLM_API_KEY")
    if key is not None and (not key.isascii() or not key.isprintable() or " " in key or not key):
        raise ValueError(
            "--api-key, FASTDLLM_API_KEY: takes printable ASCII without blanks, 1 character or more"
        )
    return key


def _name(arguments: argparse.Namespace) -> str:
    """What the model is called: its name on the Hub, or its folder's."""
    if arguments.served_model_name:
        return str(arguments.served_model_name)
    folder = Path(arguments.model)
    return folder.resolve().name if folder.is_dir() else str(arguments.model)
