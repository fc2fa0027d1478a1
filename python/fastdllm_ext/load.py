"""Loading checkpoints into our own classes: no remote code, patched and ready to generate."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (  # type: ignore[attr-defined]  # a fast class that 5.x keeps as another name
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
)

from fastdllm_ext.compat import add_chat_template, checkpoint_file, dtype_argument, tie
from fastdllm_ext.compat import generation_config as make_generation_config
from fastdllm_ext.decoding import CONFIG_KEY, GenerationConfig
from fastdllm_ext.methods import patch
from fastdllm_ext.models import DreamModel, LLaDAModelLM
from fastdllm_ext.models.layers import read_generation_config
from fastdllm_ext.patching.registry import supported_text

# Own classes by the name that a checkpoint's config.json gives in `architectures`. (The model_type
# would not do: LLaDA-MoE says "llada" too.)
CLASSES: dict[str, type[PreTrainedModel]] = {"LLaDAModelLM": LLaDAModelLM, "DreamModel": DreamModel}


def demo_model_path() -> Path:
    """Folder of the bundled demo model, for :func:`load`."""
    return Path(str(files("fastdllm_ext") / "demo_model"))


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    device_map: Any = None,
    generation_config: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A checkpoint's model, in evaluation mode and patched, and its tokenizer.

    Args:
        path_or_id: a folder, or a name on the Hugging Face Hub.
        dtype: of the weights; "auto" is the checkpoint's.
        device: "auto" is the first GPU where there is one.
        device_map: in place of ``device``: where each part goes, as ``from_pretrained`` takes it ("auto",
            "cuda:1", {"model.embed_tokens": 0, ...}). Needs the accelerate package.
        generation_config: a folder or name whose generation_config.json has settings of ours
            (:meth:`GenerationConfig.save_pretrained`, ``fastdllm-ext calibrate``), which count before the
            checkpoint's own.

    Returns:
        (model, tokenizer); the tokenizer is None where the checkpoint has none. The checkpoint's
        generation_config.json is ``model.generation_config``, None where it has none.

    Raises:
        ValueError: a model that is not supported, weights that do not fit its configuration, or both
            ``device`` and ``device_map``.
        ImportError: ``device_map`` without accelerate.
        OSError: no such folder or checkpoint, or no generation_config.json in ``generation_config``.
    """
    where = os.fspath(path_or_id)
    ours = None if generation_config is None else GenerationConfig.from_pretrained(generation_config)
    if device_map is not None and device != "auto":
        raise ValueError(f"device={str(device)!r} and device_map={device_map!r}; takes one of them")
    if device_map is not None and find_spec("accelerate") is None:
        raise ImportError("device_map needs the accelerate package: pip install accelerate")
    config, _ = PretrainedConfig.get_config_dict(where)
    architectures = config.get("architectures") or []
    known = next((CLASSES[name] for name in architectures if name in CLASSES), None)
    if known is None:
        raise ValueError(
            f"{where}: model_type={config.get('model_type')!r} with architectures={architectures} is not "
            f"supported. {supported_text()}"
        )
    placing = {} if device_map is None else {"device_map": device_map}
    loaded: Any = known.from_pretrained(where, output_loading_info=True, **dtype_argument(dtype), **placing)
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"{where}: {kind.replace('_', ' ')} in its weights: {sorted(map(str, info[kind]))[:5]}"
            )
    tie(model)
    if device_map is None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
    model.generation_config = read_generation_config(where)
    if ours is not None:
        model.generation_config = model.generation_config or make_generation_config({})
        setattr(model.generation_config, CONFIG_KEY, ours.to_dict())
    patch(model.eval())
    return model, load_tokenizer(where)


def load_tokenizer(where: str) -> PreTrainedTokenizerBase | None:
    """A checkpoint's tokenizer without remote code; None where it has none."""
    settings_file = checkpoint_file(where, "tokenizer_config.json")
    has_json = checkpoint_file(where, "tokenizer.json") is not None
    has_bpe = all(checkpoint_file(where, name) for name in ("vocab.json", "merges.txt"))
    if not (settings_file or has_json or has_bpe):
        return None
    settings = json.loads(Path(settings_file).read_text(encoding="utf-8")) if settings_file else {}
    named = settings.get("tokenizer_class")
    # Dream names a class of its own, which is remote code. What it computes is Qwen2's byte-level BPE.
    if named is not None and not hasattr(transformers, named) and (has_json or has_bpe):
        tokenizer_class: Any = PreTrainedTokenizerFast if has_json else Qwen2TokenizerFast
        tokenizer = tokenizer_class.from_pretrained(where)
    else:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    add_chat_template(tokenizer, checkpoint_file(where, "chat_template.jinja"))
    return tokenizer
