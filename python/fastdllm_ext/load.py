"""Loading checkpoints into our own classes: no remote code, patched and ready to generate."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from fastdllm_ext.compat import dtype_argument
from fastdllm_ext.generate import patch
from fastdllm_ext.models import LLaDAModelLM
from fastdllm_ext.patching.registry import supported_text

# Own classes by the name that a checkpoint's config.json gives in `architectures`. (The model_type
# would not do: LLaDA-MoE says "llada" too.)
CLASSES: dict[str, type[PreTrainedModel]] = {"LLaDAModelLM": LLaDAModelLM}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def demo_model_path() -> Path:
    """Folder of the bundled demo model, for :func:`load`."""
    return Path(str(files("fastdllm_ext") / "demo_model"))


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A checkpoint's model, in evaluation mode and patched, and its tokenizer.

    Args:
        path_or_id: a folder, or a name on the Hugging Face Hub.
        dtype: of the weights; "auto" is the checkpoint's.
        device: "auto" is the first GPU where there is one.

    Returns:
        (model, tokenizer); the tokenizer is None where the checkpoint has none.

    Raises:
        ValueError: a model that is not supported, or weights that do not fit its configuration.
        OSError: no such folder or checkpoint.
    """
    where = os.fspath(path_or_id)
    config, _ = PretrainedConfig.get_config_dict(where)
    architectures = config.get("architectures") or []
    known = next((CLASSES[name] for name in architectures if name in CLASSES), None)
    if known is None:
        raise ValueError(
            f"{where}: model_type={config.get('model_type')!r} with architectures={architectures} is not "
            f"supported. {supported_text()}"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = known.from_pretrained(where, output_loading_info=True, **dtype_argument(dtype))
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"{where}: {kind.replace('_', ' ')} in its weights: {sorted(map(str, info[kind]))[:5]}"
            )
    patch(model.to(device).eval())
    return model, _tokenizer(where)


def _tokenizer(where: str) -> PreTrainedTokenizerBase | None:
    missing_is_none: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if not any(cached_file(where, name, **missing_is_none) for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
