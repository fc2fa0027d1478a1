"""The command line: `fastdllm-ext`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import fastdllm_ext
from fastdllm_ext.threads import let_threads_sleep


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    if argv is None and sys.argv[1:2] == ["serve"]:
        let_threads_sleep()
    parser = argparse.ArgumentParser(
        prog="fastdllm-ext",
        description="Fast decoding of open diffusion language models, without retraining.",
    )
    parser.add_argument("--version", action="version", version=f"fastdllm_ext {fastdllm_ext.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    env = commands.add_parser("env", help="print versions, CPU and CUDA facts, and what was compiled in")
    env.add_argument("--json", action="store_true", help="as JSON")

    demo = commands.add_parser("demo", help="the bundled model, unpatched against patched, as one table")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for JSON and PNG (demo-out)")
    demo.add_argument("--prompts", type=int, default=54, help="held-out prompts to answer (54)")
    demo.add_argument("--seed", type=int, default=0, help="choice of prompts (0)")

    # Their options need modules that the others do without, so they are read when asked for.
    for name, (_, words) in _LATER.items():
        commands.add_parser(name, help=words, add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in _LATER:
        return _run_later(arguments.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "env":
        facts = fastdllm_ext.collect_env()
        print(json.dumps(facts, indent=2) if arguments.json else fastdllm_ext.env.format_env())
        return 0
    from fastdllm_ext.demo import run

    return run(arguments.out, arguments.prompts, arguments.seed)


# Command: its module, with `add_arguments` and `run`, and what it does.
_LATER = {
    "generate": ("fastdllm_ext.commands.generate", "answers to prompts: one, or files of them"),
    "chat": ("fastdllm_ext.commands.chat", "a conversation in the terminal: answers as they emerge"),
    "serve": ("fastdllm_ext.serve.command", "OpenAI's API over HTTP, and a page that shows answers emerge"),
    "report": ("fastdllm_ext.eval.report", "accuracy against speed of a model, as a page, pictures and JSON"),
    "calibrate": ("fastdllm_ext.eval.calibrate", "the fastest settings that lose no more than you allow"),
    "eval": ("fastdllm_ext.eval.command", "lm-evaluation-harness, with generations made fast"),
}


def _run_later(command: str, argv: Sequence[str]) -> int:
    """Runs a command whose module is imported for it; its complaints are one line."""
    module: Any = import_module(_LATER[command][0])
    if not hasattr(module, "add_arguments"):  # hands its arguments on as they are
        return int(module.run(argv))
    try:
        parser = argparse.ArgumentParser(prog=f"fastdllm-ext {command}", description=_LATER[command][1])
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(argv)))
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"fastdllm-ext {command}: {error}", file=sys.stderr)
        return 2
