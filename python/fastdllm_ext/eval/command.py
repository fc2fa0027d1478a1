"""`fastdllm-ext eval`: lm_eval's own command line with our backend, and speed beside the scores."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastdllm_ext.decoding import RULES
from fastdllm_ext.eval import NEEDS

__all__ = ["read_settings", "run", "settings_names"]

SUBCOMMANDS = ("run", "ls", "validate")
DICTIONARIES = ("model_args", "gen_kwargs", "metadata")
HELP = """\
usage: fastdllm-ext eval [--settings NAME[,NAME ...]] [arguments of lm_eval ...]

lm_eval with --model fastdllm; tokens per second and forwards are printed below its table.

  --settings NAME  shipped settings, or a file of lm_eval's --config format, under the other arguments;
                   of several the later counts. Shipped: {names}

  fastdllm-ext eval --settings gsm8k --limit 100
  fastdllm-ext eval --tasks gsm8k --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,threshold=0.9,cache=dual

docs/evaluation.md has all model arguments. What follows is lm_eval's own help.
"""


def run(argv: Sequence[str]) -> int:
    """Evaluates as the arguments say, and prints the throughput; the exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print(f"fastdllm-ext eval: {NEEDS}", file=sys.stderr)
        return 2
    from fastdllm_ext.eval.throughput import format_throughput

    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(names=", ".join(settings_names())))
        arguments = ["run", "--help"]
    try:
        arguments = lm_eval_arguments(arguments)
    except (OSError, TypeError, ValueError) as error:
        print(f"fastdllm-ext eval: {error}", file=sys.stderr)
        return 2
    before, sys.argv = sys.argv, ["lm-eval", *arguments]  # which is where lm_eval reads them
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    if arguments[0] == "run" and "fastdllm_ext.eval.harness" in sys.modules:
        from fastdllm_ext.eval.harness import latest_throughput

        if found := latest_throughput():
            print(format_throughput(found))
    return 0


def lm_eval_arguments(argv: Sequence[str]) -> list[str]:
    """lm_eval's arguments for ours: settings in front, where the user's come later and count."""
    argv = list(argv)
    if argv[0] in SUBCOMMANDS[1:]:
        return argv
    if argv[0] == "run":
        argv = argv[1:]
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--settings", action="append", default=[])
    ours.add_argument("--model_args", "-a", nargs="+", action="append", default=[])
    ours.add_argument("--model", "-M")
    given, rest = ours.parse_known_args(argv)
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    others.add_argument("--config", "-C")
    others.add_argument("--tasks", "-t", nargs="+", default=[])
    seen, _ = others.parse_known_args(rest)
    names = [name for text in given.settings for name in text.split(",") if name]
    if names and seen.config:
        raise ValueError(f"--settings {','.join(names)}, --config {seen.config}; takes one of them")

    settings: dict[str, Any] = {}
    for name in names:
        settings = merged(settings, read_settings(name))
    if given.model_args:
        settings = merged(settings, {"model_args": _model_args(given.model_args)})
    if seen.tasks:
        settings.pop("tasks", None)  # lm_eval adds up what several --tasks say
    # With lm_eval's own --config, the file's model counts, as does ours where it names none.
    model = given.model or settings.pop("model", None) or (_model_of(seen.config) if seen.config else None)
    settings = {"model": model or "fastdllm"} | {k: v for k, v in settings.items() if k != "model"}
    if settings["model"] == "fastdllm":  # at once, and without lm_eval's frames around the message
        from fastdllm_ext.eval.harness import FastDLLM, refuse_unknown

        own = inspect.signature(FastDLLM).parameters
        refuse_unknown({k: v for k, v in settings.get("model_args", {}).items() if k not in own})
    return ["run", *_as_arguments(settings), *rest]


def settings_names() -> list[str]:
    """The settings that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def read_settings(name: str) -> dict[str, Any]:
    """A shipped settings file by its name, or any by its path, of lm_eval's --config format.

    Raises:
        ValueError: no such settings.
        TypeError: the file does not hold a mapping.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    path = Path(str(_folder() / f"{name}.yaml")) if name in settings_names() else Path(name)
    if not path.is_file():
        raise ValueError(f"--settings {name}; takes one of {', '.join(settings_names())}, or a file")
    found: dict[str, Any] = EvaluatorConfig.load_yaml_config(path)
    return found


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings with others over them: arguments of the model one by one, a rule in the place of another."""
    found = below | above
    for name in DICTIONARIES:
        if name not in below or name not in above:
            continue
        kept = dict(below[name])
        if name == "model_args" and any(above[name].get(rule) is not None for rule in RULES):
            kept = {key: value for key, value in kept.items() if key not in RULES}
        found[name] = kept | above[name]
    return found


def _folder() -> Any:
    return files("fastdllm_ext.eval") / "settings"


def _model_args(given: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What one or more --model_args say, read as lm_eval reads them."""
    from lm_eval._cli.utils import MergeDictAction

    parser = argparse.ArgumentParser(prog="fastdllm-ext eval", add_help=False)
    parser.add_argument("--model_args", nargs="+", action=MergeDictAction, default=None)
    found = parser.parse_args([text for values in given for text in ("--model_args", *values)])
    return dict(found.model_args or {})


def _model_of(config: str) -> str | None:
    return read_settings(config).get("model")


def _as_arguments(settings: dict[str, Any]) -> list[str]:
    """A mapping as a command line: True is a flag, what is False or None is left out."""
    found: list[str] = []
    for name, value in settings.items():
        if name == "fewshot_as_multiturn" and value is False:
            found += ["--fewshot_as_multiturn", "false"]  # of which lm_eval's default is another
        elif value is None or value is False:
            continue
        elif value is True:
            found += [f"--{name}"]
        elif isinstance(value, dict):
            found += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            found += [f"--{name}", ",".join(map(str, value))]
        else:
            found += [f"--{name}", str(value)]
    return found
