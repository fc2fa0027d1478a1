"""The kinds of models that patching is tested on: our own classes, and a checkpoint's modeling files.

FASTDLLM_REMOTE_CODE names a folder with such files: ``modeling_*.py``, ``configuration_*.py``, and what these
import.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import fastdllm_ext as fd
from tiny import tiny_dream, tiny_llada

FOLDER = os.environ.get("FASTDLLM_REMOTE_CODE")
TINY: dict[str, Callable[..., Any]] = {"llada": tiny_llada, "dream": tiny_dream}
CLASSES = {"llada": ("LLaDAConfig", "LLaDAModelLM"), "dream": ("DreamConfig", "DreamModel")}


@dataclass(frozen=True)
class Kind:
    """Own classes, or with ``folder`` those of the modeling files that it holds."""

    model_type: str
    folder: str | None = None

    def __str__(self) -> str:
        return self.model_type + ("" if self.folder is None else "-remote")

    @contextmanager
    def skipping_what_files_cannot(self, what: str) -> Iterator[None]:
        """Around what is done to an unpatched model: where published files fail at it, so would anyone."""
        try:
            yield
        except Exception as e:
            if self.folder is None:
                raise
            version = f"transformers {transformers.__version__}"
            pytest.skip(f"{self.folder} on {version}, unpatched: {what}: {type(e).__name__}: {e}")

    def unpatched(self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """A small model with random weights that was never patched."""
        with self.skipping_what_files_cannot("construction"):
            classes = {} if self.folder is None else {"classes": remote_classes(self.folder, self.model_type)}
            return TINY[self.model_type](seed, dtype, patched=False, **classes, **changes)

    def patched(self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """The same model, patched."""
        return fd.patch(self.unpatched(seed, dtype, **changes))

    def call(self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the model's own call; bool ``mask`` [B, S] says which positions to attend to."""
        if mask is not None and self.model_type == "dream":
            mask = mask[:, None, None]
        return model(ids, attention_mask=mask).logits

    def call_unpatched(self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`call` of an unpatched model."""
        with self.skipping_what_files_cannot("its own call"):
            return self.call(model, ids, mask)


def remote_classes(folder: str, model_type: str) -> tuple[type, type]:
    """The configuration's and the model's class of the modeling files in a folder, imported as a package."""
    package = ModuleType("_remote_code")
    package.__path__ = [folder]  # without running its __init__.py, which may import more than the model
    sys.modules.setdefault(package.__name__, package)
    config, model = CLASSES[model_type]
    return (
        getattr(importlib.import_module(f"_remote_code.configuration_{model_type}"), config),
        getattr(importlib.import_module(f"_remote_code.modeling_{model_type}"), model),
    )


def kinds() -> list[Kind]:
    """Own classes of every family, and the modeling files of ``FASTDLLM_REMOTE_CODE``."""
    found = [Kind(model_type) for model_type in TINY]
    if FOLDER is not None:
        remote = [Kind(t, FOLDER) for t in TINY if (Path(FOLDER) / f"modeling_{t}.py").exists()]
        if not remote:
            raise pytest.UsageError(
                f"FASTDLLM_REMOTE_CODE={FOLDER}: no modeling_llada.py, no modeling_dream.py"
            )
        found += remote
    return found
