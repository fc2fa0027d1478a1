"""What the own models share: norm, rotation, attention, and the base class that saves and refuses alike."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from fastdllm_ext.compat import checkpoint_file, generation_config, generation_settings

__all__ = ["DiffusionModel", "RMSNorm", "attend", "read_generation_config", "rotate"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in float32, cast back, times the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] in any floating dtype -> the same shape and dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation in the arguments' dtype. x [..., T, head_dim]; cos, sin [..., T, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of every query to every key that the mask allows.

    Args:
        q: [B, heads, T, head_dim].
        k: [B, kv_heads, T, head_dim], with ``heads`` a multiple of ``kv_heads``.
        v: like ``k``.
        mask: broadcastable to [B, heads, T, T]; bool, True where a query attends, or floating and added to
            the scores.

    Returns:
        [B, T, heads * head_dim].
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def read_generation_config(path_or_id: str | os.PathLike[str]) -> GenerationConfig | None:
    """A checkpoint's generation_config.json as it is; None where there is none.

    Keys that transformers does not know (``alg``, ``steps``, ``fastdllm``, ...) become attributes, also where
    the file says ``_from_model_config``, as Dream's does; nothing is validated.
    """
    file = checkpoint_file(path_or_id, GENERATION_CONFIG_NAME)
    if file is None:
        return None
    with open(file, encoding="utf-8") as text:
        return generation_config(json.load(text))


class DiffusionModel(PreTrainedModel):
    """Base of the own models.

    Attributes:
        generation_config: the checkpoint's, where ``fastdllm_ext.load`` found one. ``save_pretrained`` writes
            it back. (``can_generate`` is False: transformers' own ``generate`` does not fit these models.)
    """

    generation_config: Any = None
    _supports_sdpa = True

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Writes configuration, weights and, where there is one, generation_config.json to a folder.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes what is not weights.
            **kwargs: of ``PreTrainedModel.save_pretrained``.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.generation_config is not None and is_main_process:
            # GenerationConfig.save_pretrained refuses what these models' files hold, such as temperature 0.
            settings = generation_settings(self.generation_config)
            with open(os.path.join(save_directory, GENERATION_CONFIG_NAME), "w", encoding="utf-8") as text:
                text.write(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _refuse(self, arguments: Mapping[str, Any]) -> None:
        """ValueError that names those of a forward's arguments that hold a value: not None, False or 0."""
        given = sorted(
            name
            for name, value in arguments.items()
            if not (value is None or (isinstance(value, (bool, int)) and not value))
        )
        if given:
            raise ValueError(f"{type(self).__name__}.forward: {', '.join(given)} not supported")

    def _one_input(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}.forward: give either input_ids or inputs_embeds")
