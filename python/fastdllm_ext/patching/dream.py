"""Dream, Dream-Coder and DiffuCoder: our own classes, the Hub's remote code, and NVlabs' modified copy."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdllm_ext.patching.family import Family, Geometry, Layer, Parts, require, special_tokens

# Configuration keys that change the computation in ways this file does not follow.
_OFFICIAL = {"hidden_act": "silu", "use_sliding_window": False}
_VERIFIED = (
    "random weights: own classes with the official keys, names and shards; published modeling files, token "
    "for token. The published weights have not been run"
)
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Dream(Family):
    """Dream-v0-7B, Dream-Coder-v0-7B, DiffuCoder-7B: Qwen2's layers, without a causal mask.

    Logits of position i come from row i - 1: Dream predicts the next token.
    """

    model_type = "dream"
    rms_norms: ClassVar = {"RMSNorm": "eps", "DreamRMSNorm": "variance_epsilon"}
    checkpoints: ClassVar = {
        "Dream-org/Dream-v0-Base-7B": _VERIFIED,
        "Dream-org/Dream-v0-Instruct-7B": _VERIFIED,
        "Dream-org/Dream-Coder-v0-Base-7B": _VERIFIED,
        "Dream-org/Dream-Coder-v0-Instruct-7B": _VERIFIED,
        "apple/DiffuCoder-7B-Base": _VERIFIED,
        "apple/DiffuCoder-7B-Instruct": _VERIFIED,
        "apple/DiffuCoder-7B-cpGRPO": _VERIFIED,
    }
    needs_prompt = True
    shift = True
    samples_first = True
    generate_name = "diffusion_generate"

    def recognises(self, model: Any) -> bool:
        """Has the module names of Qwen2's layers."""
        layers = getattr(getattr(model, "model", None), "layers", None)
        return layers is not None and all(
            all(hasattr(getattr(layer, "self_attn", None), name) for name in _ATTENTION.values())
            and all(hasattr(getattr(layer, "mlp", None), name) for name in _MLP.values())
            for layer in layers
        )

    def geometry(self, model: Any) -> Geometry:
        """Sizes and token ids from the model's configuration."""
        c = model.config
        require(self, c, _OFFICIAL)
        scaling = getattr(c, "rope_scaling", None) or {}
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ValueError(f"model: rope_scaling={scaling!r} is not supported for dream; takes None")
        return Geometry(
            num_layers=c.num_hidden_layers,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.hidden_size // c.num_attention_heads,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            max_positions=c.max_position_embeddings,
            rope_theta=getattr(c, "rope_theta", None) or scaling["rope_theta"],
            rounded_rope=True,
            **special_tokens(model),
        )

    def parts(self, model: Any) -> Parts:
        """Embedding, layers, final norm and head."""
        return Parts(
            embedding=model.model.embed_tokens,
            layers=tuple(
                Layer(
                    attn_norm=layer.input_layernorm,
                    mlp_norm=layer.post_attention_layernorm,
                    **{part: getattr(layer.self_attn, name) for part, name in _ATTENTION.items()},
                    **{part: getattr(layer.mlp, name) for part, name in _MLP.items()},
                )
                for layer in model.model.layers
            ),
            norm=model.model.norm,
            head=model.lm_head,
        )
