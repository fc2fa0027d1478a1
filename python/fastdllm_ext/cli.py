"""The command line: `fastdllm-ext`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import fastdllm_ext


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
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

    arguments = parser.parse_args(argv)
    if arguments.command == "env":
        facts = fastdllm_ext.collect_env()
        print(json.dumps(facts, indent=2) if arguments.json else fastdllm_ext.env.format_env())
        return 0
    from fastdllm_ext.demo import run

    return run(arguments.out, arguments.prompts, arguments.seed)
