"""What the backend of lm_eval is told, most of it as text: checked, and made into values and a model."""

from __future__ import annotations

import ast
import os
from datetime import timedelta
from typing import Any

import torch

import fastdllm_ext as fd
from fastdllm_ext.checks import check_count

__all__ = ["as_dtype", "as_rows", "checked", "join_processes", "parsed"]


def checked(config: fd.GenerationConfig) -> fd.GenerationConfig:
    """TypeError or ValueError where a setting is none for many prompts of unequal length."""
    for name in ("gen_length", "seed"):
        value = getattr(config, name)
        if isinstance(value, (list, tuple)):
            raise TypeError(f"{name}={value!r}; an evaluation takes one int for all requests")
    if config.infill:
        raise ValueError("infill=True: a task's prompts hold no masks; an evaluation takes False")
    return config


def parsed(value: Any) -> Any:
    """A setting that came as text: numbers, tuples, True, False and None; other text stays as it is."""
    if not isinstance(value, str):
        return value
    words: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None, "": None}
    if value.strip().lower() in words and value.strip() != "none":
        return words[value.strip().lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def as_rows(value: int | str | None) -> int | str:
    """A batch size: a count, or "auto"; ValueError of any other text."""
    if value is None:
        return 1
    if isinstance(value, str):
        if value.split(":")[0] == "auto":
            return "auto"
        if not value.isdecimal():
            raise ValueError(f"batch_size={value!r}; takes a number of rows, or 'auto'")
        value = int(value)
    check_count("batch_size", value)
    return value


def as_dtype(value: torch.dtype | str) -> torch.dtype | str:
    """A dtype by its name, or "auto"; ValueError of any other text."""
    if isinstance(value, torch.dtype) or value == "auto":
        return value
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={value!r}; takes 'auto', 'float32', 'bfloat16' or 'float16'")
    return found


def join_processes(device: Any) -> Any:
    """What joins this process to the others of accelerate or torchrun; None where it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError("several processes need the accelerate package: pip install accelerate") from error
    # The processes wait for the slowest, whose answers may take hours longer than torch's minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=1))
    cpu = str(device).startswith("cpu") or not torch.cuda.is_available()
    return Accelerator(cpu=cpu, kwargs_handlers=[patience])
