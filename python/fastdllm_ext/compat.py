"""Differences between versions of transformers, all in this file."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

_OLDEST, _NEWEST_MAJOR = (4, 46), 5  # what the tests run on, and pyproject.toml asks for


def _checked(version: str) -> tuple[int, int]:
    """(major, minor) of a version of transformers; ImportError below the oldest that is supported."""
    major, minor = (int(part) for part in version.split(".")[:2])
    supported = f"fastdllm_ext supports {'.'.join(map(str, _OLDEST))} to {_NEWEST_MAJOR}.x"
    if (major, minor) < _OLDEST:
        raise ImportError(f"transformers {version} is too old; {supported}")
    if major > _NEWEST_MAJOR:
        warnings.warn(f"transformers {version} has not been tried; {supported}", stacklevel=2)
    return major, minor


_VERSION = _checked(transformers.__version__)


def dtype_argument(dtype: torch.dtype | str) -> dict[str, Any]:
    """``from_pretrained``'s argument for the weights' dtype, named ``dtype`` since 4.56."""
    return {"dtype" if _VERSION >= (4, 56) else "torch_dtype": dtype}


def tied_weights(pairs: dict[str, str]) -> Any:
    """A model class's ``_tied_weights_keys`` from {tied: source}; before 5.0 a list of the tied ones."""
    return pairs if _VERSION >= (5, 0) else list(pairs)


def tie(model: PreTrainedModel) -> None:
    """Ties what the configuration says is tied: 5.0 leaves apart a head that the checkpoint holds as well."""
    model.tie_weights()


def checkpoint_file(path_or_id: str | os.PathLike[str], name: str) -> str | None:
    """A checkpoint's file on this machine; None where it has no such file."""
    return cached_file(
        os.fspath(path_or_id),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def add_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | None) -> None:
    """Gives a tokenizer the template of its chat_template.jinja, which 4.46 does not read."""
    if tokenizer.chat_template is None and file is not None:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8")


# Before 5.0 these have defaults, which a file that leaves them out does not mean.
_SAMPLING = ("temperature", "top_p", "top_k")


def generation_config(settings: dict[str, Any]) -> GenerationConfig:
    """A generation configuration of just these settings, unknown keys included; nothing is validated."""
    config = GenerationConfig(**dict.fromkeys(_SAMPLING))
    for key, value in settings.items():
        if not key.startswith("_"):
            setattr(config, key, value)
    return config


def generation_settings(config: GenerationConfig) -> dict[str, Any]:
    """What a generation configuration sets, also where it is a default of before 5.0."""
    settings: dict[str, Any] = json.loads(config.to_json_string())
    for name in _SAMPLING:
        if getattr(config, name, None) is not None:
            settings[name] = getattr(config, name)
    return settings
