"""LLaDA: our own classes, the Hub's remote code, and NVlabs' modified copy (same module names)."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdllm_ext.patching.family import Family, Geometry, Layer, Parts, require, special_tokens

# Configuration keys that change the computation in ways this file does not follow.
_OFFICIAL = {
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
_VERIFIED = (
    "random weights: own classes with the official keys, names and shards; published modeling files, token "
    "for token. The published weights have not been run"
)
_MODULES = {
    "attn_norm": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
    "mlp_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip


class LLaDA(Family):
    """LLaDA-8B Base and Instruct, LLaDA-1.5. Logits of position i come from row i."""

    model_type = "llada"
    rms_norms: ClassVar = {"RMSNorm": "eps", "RMSLayerNorm": "eps"}
    checkpoints: ClassVar = {
        "GSAI-ML/LLaDA-8B-Base": _VERIFIED,
        "GSAI-ML/LLaDA-8B-Instruct": _VERIFIED,
        "GSAI-ML/LLaDA-1.5": _VERIFIED,
    }

    def recognises(self, model: Any) -> bool:
        """Has the module names of LLaDA's Llama blocks (LLaDA-MoE calls itself "llada" too)."""
        blocks = getattr(getattr(getattr(model, "model", None), "transformer", None), "blocks", None)
        return blocks is not None and all(
            hasattr(block, name) for block in blocks for name in _MODULES.values()
        )

    def geometry(self, model: Any) -> Geometry:
        """Sizes and token ids from the model's configuration."""
        c = model.config
        require(self, c, _OFFICIAL)
        return Geometry(
            num_layers=c.n_layers,
            num_kv_heads=c.n_kv_heads or c.n_heads,
            head_dim=c.d_model // c.n_heads,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            max_positions=c.max_sequence_length,
            rope_theta=c.rope_theta,
            **special_tokens(model),
        )

    def parts(self, model: Any) -> Parts:
        """Embedding, blocks, final norm, and the head, which may be the embedding."""
        t = model.model.transformer
        if model.config.weight_tying and t.wte.weight.is_meta and hasattr(t.wte, "_hf_hook"):
            # Offloaded: the weight is there while the embedding runs, not while it serves as the head.
            raise ValueError("model: a tied embedding (weight_tying) is offloaded; takes one on a device")

        return Parts(
            embedding=t.wte,
            layers=tuple(
                Layer(**{part: getattr(block, name) for part, name in _MODULES.items()}) for block in t.blocks
            ),
            norm=t.ln_f,
            head=t.wte if model.config.weight_tying else t.ff_out,
        )
