"""LLaDA: our own classes, the Hub's remote code, and NVlabs' modified copy (same module names)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext.patching.family import Family, Geometry, layer_number, running_attention

# Configuration keys that change the computation in ways this file does not follow.
_REQUIRED = {
    "block_type": "llama",
    "block_group_size": 1,
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}


def _attention(self: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """In place of a block's ``attention``: q [1, T, d_model], k and v [1, T, kv width]."""
    attend = running_attention()
    if attend is None:
        return type(self).attention(self, q, k, v, *args, **kwargs)
    return self.attn_out(attend(layer_number(self), q[0], k[0], v[0])[None]), None


class LLaDA(Family):
    """LLaDA-8B Base and Instruct, LLaDA-1.5. Logits of position i come from row i."""

    name = "llada"
    checkpoints = ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5")

    def recognises(self, model: Any) -> bool:
        """Has the module names of LLaDA's Llama blocks (LLaDA-MoE calls itself "llada" too)."""
        transformer = getattr(getattr(model, "model", None), "transformer", None)
        if transformer is None or not hasattr(transformer, "blocks"):
            return False
        return all(
            all(hasattr(block, part) for part in ("attention", "q_proj", "up_proj", "attn_out"))
            for block in transformer.blocks
        )

    def geometry(self, model: Any) -> Geometry:
        """Sizes and token ids from the model's configuration."""
        c = model.config
        for key, value in _REQUIRED.items():
            found = getattr(c, key, value)
            if found is not None and getattr(found, "value", found) != value:
                raise ValueError(f"model: {key}={found!r} is not supported for llada; takes {value!r}")
        eos = c.eos_token_id if isinstance(c.eos_token_id, (list, tuple)) else [c.eos_token_id]
        eos = tuple(int(token) for token in eos if token is not None)
        head_dim = c.d_model // c.n_heads
        return Geometry(
            num_layers=c.n_layers,
            num_kv_heads=model.model.transformer.blocks[0].k_proj.out_features // head_dim,
            head_dim=head_dim,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            max_positions=c.max_sequence_length,
            rope_theta=c.rope_theta,
            mask_id=c.mask_token_id,
            eos_ids=eos,
            pad_id=c.pad_token_id if c.pad_token_id is not None else (eos or (0,))[0],
        )

    def methods(self, model: Any) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """Each block's ``attention``."""
        return [(block, "attention", _attention) for block in model.model.transformer.blocks]

    def hidden(self, model: Any, input_ids: Tensor) -> Tensor:
        """Embedding, blocks and final norm, over one ragged row."""
        parts = model.model.transformer
        x = parts.wte(input_ids[None])
        for block in parts.blocks:
            x, _ = block(x)
        return parts.ln_f(x)[0]

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """The language-model head."""
        parts = model.model.transformer
        return F.linear(hidden, parts.wte.weight) if model.config.weight_tying else parts.ff_out(hidden)
