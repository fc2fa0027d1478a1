"""What commands are told about a model and about decoding, opened."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.logging import disable_progress_bar

from fastdllm_ext.arguments import check_settings, with_token_ids
from fastdllm_ext.checks import check_count
from fastdllm_ext.compat import dtype_argument
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine import Engine
from fastdllm_ext.engine.team import Team
from fastdllm_ext.generate import defaults_of
from fastdllm_ext.load import demo_model_path, load, load_tokenizer
from fastdllm_ext.methods import patch
from fastdllm_ext.patching.family import Family, Geometry
from fastdllm_ext.patching.registry import CHOICES, patched_family, unwrapped

__all__ = [
    "add_model_arguments",
    "add_settings_arguments",
    "check_for_model",
    "check_limits",
    "ending",
    "load_remote",
    "open_engine",
    "open_model",
    "open_tokenizer",
    "option",
]

DEMO = "demo"  # the bundled model's name as MODEL
DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


def _refresh(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


# Fields of a GenerationConfig that have an option: how its text is read, and what it says.
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "gen_length": (int, "tokens to generate at most (128)"),
    "block_length": (int, "tokens of a block (32)"),
    "steps": (int, "forwards in all: a fixed number of tokens a step"),
    "threshold": (float, "commit what is at least so likely (0.9, unless another rule is named)"),
    "factor": (float, "commit as many as Theorem 1 allows at this factor"),
    "rule": (str, "another rule: klass, klass:kl=0.01:threshold=0.9, ..."),
    "cache": (str, "none, prefix or dual (dual)"),
    "refresh": (_refresh, "'block', or every how many blocks the whole row is computed (block)"),
    "temperature": (float, "of sampling; 0 takes the likeliest (0)"),
    "top_p": (float, "sample from the likeliest tokens that have so much probability together"),
    "top_k": (int, "sample from so many of the likeliest tokens"),
    "seed": (int, "of sampling (drawn)"),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it is loaded and run: for :func:`open_model`."""
    parser.add_argument(
        "model", nargs="?", default=DEMO, metavar="MODEL",
        help=f"a folder or a name on the Hub; '{DEMO}' is the bundled model ({DEMO})",
    )  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dtype", choices=list(DTYPES), default="auto", help="of the weights (the checkpoint's)"
    )
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 (the first GPU where there is one)"
    )
    group.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the checkpoint's own Python code, whatever it does, in place of this package's classes",
    )  # fmt: skip
    group.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N",
        help="GPUs, or processes on a CPU, that compute each forward together (1)",
    )  # fmt: skip
    for name, choices in CHOICES.items():
        group.add_argument(
            option(name), choices=choices, default=choices[0],
            help=f"as fastdllm_ext.patch takes it ({choices[0]})",
        )  # fmt: skip


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """How to decode: for :func:`open_engine`."""
    group = parser.add_argument_group(
        "decoding", "Where nothing is said: what the checkpoint's generation_config.json says, or (...)."
    )
    group.add_argument(
        "--generation-config", metavar="PATH",
        help="a folder or a name whose generation_config.json counts before the checkpoint's",
    )  # fmt: skip
    for name, (kind, words) in SETTINGS.items():
        group.add_argument(option(name), type=kind, metavar=name.split("_")[-1].upper(), help=words)


def option(name: str) -> str:
    """An argument's name on the command line."""
    return f"--{name.replace('_', '-')}"


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model that :func:`add_model_arguments` names, patched, and its tokenizer.

    Raises:
        ValueError, OSError: as :func:`fastdllm_ext.load` and :func:`fastdllm_ext.patch`; a model without a
            tokenizer.
    """
    opened: Callable[..., tuple[Any, Any]] = load_remote if arguments.trust_remote_code else load
    where = _where(arguments)
    try:
        model, tokenizer = opened(where, dtype=DTYPES[arguments.dtype], device=arguments.device)
    except OSError as error:
        raise OSError(f"{arguments.model}: {error}") from error
    if tokenizer is None:
        raise ValueError(f"{arguments.model}: has no tokenizer; takes a model with one")
    patch(model, **{name: getattr(arguments, name) for name in CHOICES})
    return model, tokenizer


def open_tokenizer(arguments: argparse.Namespace) -> Any:
    """The model's tokenizer alone. ValueError or OSError where there is none."""
    where = _where(arguments)
    if arguments.trust_remote_code:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=True)
    tokenizer = load_tokenizer(where)
    if tokenizer is None:
        raise ValueError(f"{arguments.model}: has no tokenizer; takes a model with one")
    return tokenizer


def open_engine(arguments: argparse.Namespace, **limits: int | None) -> Engine:
    """An engine of the model, whose ``config`` is that of the arguments.

    Args:
        arguments: of :func:`add_model_arguments` and :func:`add_settings_arguments`.
        **limits: of the engine: ``max_rows``, ``num_pages``, ``max_queue``.

    Raises:
        TypeError, ValueError, OSError: as :func:`open_model`; settings out of range, or none for the model.
    """
    check_limits(arguments, **limits)
    saved = _saved_config(arguments.generation_config)
    if not sys.stderr.isatty():
        disable_progress_bar()  # loading weights draws one, whoever reads it
    team = None
    if arguments.tensor_parallel_size == 1:
        model, tokenizer = open_model(arguments)
    else:
        team = _open_team(arguments)
        model, tokenizer = team.model, team.tokenizer
    given = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
    try:
        config = GenerationConfig.build(defaults_of(model) if saved is None else saved, given)
        family = patched_family(model)
        check_for_model(family, family.geometry(unwrapped(model)), config)
        return Engine(model, tokenizer, config=config, team=team, **limits)  # type: ignore[arg-type]
    except BaseException:
        if team is not None:
            team.close()
        raise


def check_limits(arguments: argparse.Namespace, **limits: int | None) -> None:
    """TypeError or ValueError where :func:`open_engine` takes no such limits."""
    for name, limit in (limits | {"tensor_parallel_size": arguments.tensor_parallel_size}).items():
        if limit is not None:
            check_count(option(name), limit)


def _where(arguments: argparse.Namespace) -> str:
    return str(demo_model_path()) if arguments.model == DEMO else str(arguments.model)


def _open_team(arguments: argparse.Namespace) -> Team:
    """The model over as many processes as the arguments say."""
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device={device} with --tensor-parallel-size; takes cpu or cuda")
    on_cpu = argparse.Namespace(**{**vars(arguments), "device": "cpu"})
    return Team(partial(open_model, on_cpu), arguments.tensor_parallel_size, device)


def _saved_config(where: str | None) -> GenerationConfig | None:
    try:
        return None if where is None else GenerationConfig.from_pretrained(where)
    except OSError as error:
        raise OSError(f"--generation-config {where}: {error}") from error


def check_for_model(family: Family, geometry: Geometry, config: GenerationConfig) -> None:
    """TypeError or ValueError where settings are none for any single prompt to the model."""
    for name in ("gen_length", "seed"):
        if isinstance(getattr(config, name), (list, tuple)):
            raise TypeError(f"{name}={getattr(config, name)}; takes one number")
    check_settings(family, with_token_ids(geometry, config), config, [], [], None)


@contextmanager
def ending() -> Iterator[None]:
    """Leaves, with the status that shells have for it, on Ctrl-C and when whoever reads stdout has enough."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        sys.exit(128 + signal.SIGPIPE)


def load_remote(
    where: Any, *, dtype: torch.dtype | str, device: str = "auto", device_map: Any = None
) -> tuple[Any, Any]:
    """A checkpoint through the modeling code that it brings along, patched; and its tokenizer.

    Not through AutoModel, which prefers our own classes from the moment on that they are imported.

    Raises:
        ValueError: it brings none.
    """
    settings, _ = PretrainedConfig.get_config_dict(where)
    code: Mapping[str, str] = settings.get("auto_map") or {}
    name = next((code[name] for name in ("AutoModel", "AutoModelForCausalLM") if name in code), None)
    if name is None or "AutoConfig" not in code:
        raise ValueError(f"trust_remote_code=True: {where} brings no modeling code; takes False")
    config_class: Any = get_class_from_dynamic_module(code["AutoConfig"], where)
    model_class: Any = get_class_from_dynamic_module(name, where)
    config = config_class.from_pretrained(where)
    placing = {} if device_map is None else {"device_map": device_map}
    model = model_class.from_pretrained(where, config=config, **dtype_argument(dtype), **placing)
    if device_map is None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device)
    return patch(model.eval()), AutoTokenizer.from_pretrained(where, trust_remote_code=True)
