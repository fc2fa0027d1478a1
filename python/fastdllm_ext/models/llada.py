"""LLaDA (arXiv 2502.09992): configuration and model, without remote code.

Configuration keys and state-dict names are those of the official checkpoints
(GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5), so their folders load as they are.

A LLaDA block is a Llama block without a causal mask:

    x = x + attn_out(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))     n = attn_norm(x)
    x = x + ff_out(silu(ff_proj(n)) * up_proj(n))                                n = ff_norm(x)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastdllm_ext.models.layers import DiffusionModel, RMSNorm, attend, rotate
from fastdllm_ext.rope import rope_table

__all__ = ["LLaDAConfig", "LLaDAModelLM"]

# What the official checkpoints all say. A configuration that says otherwise is another
# architecture (OLMo's ancestors, LLaDA-MoE), which this file does not implement.
_REQUIRED: dict[str, Any] = {
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
    "input_emb_norm": False,
    "scale_logits": False,
}


class LLaDAConfig(PretrainedConfig):
    """Configuration of a LLaDA model. The defaults are LLaDA-8B's.

    Keys that select another architecture (``block_type``, ``rope``, ``alibi``, ...) are accepted
    with the official value only; anything else is a ``ValueError`` that names the key.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        include_bias: bool = False,
        include_qkv_bias: bool = False,
        weight_tying: bool = False,
        init_std: float = 0.02,
        mask_token_id: int | None = 126336,
        bos_token_id: int | None = 126080,
        eos_token_id: int | list[int] | None = 126081,
        pad_token_id: int | None = 126081,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, value in _REQUIRED.items():
            found = kwargs.setdefault(key, value)
            if found != value and not (key == "bias_for_layer_norm" and found is None):
                raise ValueError(
                    f"LLaDAConfig: {key}={found!r} is not a LLaDA model; supported: {key}={value!r}"
                )
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.mlp_ratio = mlp_ratio
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.include_bias = include_bias
        self.include_qkv_bias = include_qkv_bias
        self.weight_tying = weight_tying
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        if d_model % n_heads or n_heads % self.n_kv_heads:
            raise ValueError(
                f"LLaDAConfig: n_heads={n_heads} must divide d_model={d_model} and be a multiple of "
                f"n_kv_heads={self.n_kv_heads}"
            )
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(  # type: ignore[call-arg]
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs
        )

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.d_model // self.n_heads


class LLaDABlock(nn.Module):
    """One layer; the formula stands at the top of this file."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        d, kv, ff = config.d_model, config.n_kv_heads * config.head_dim, config.mlp_hidden_size
        bias, qkv_bias = config.include_bias, config.include_bias or config.include_qkv_bias
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = nn.Linear(d, d, bias=qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=qkv_bias)
        self.attn_out = nn.Linear(d, d, bias=bias)
        self.ff_norm = RMSNorm(d, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d, ff, bias=bias)
        self.up_proj = nn.Linear(d, ff, bias=bias)
        self.ff_out = nn.Linear(ff, d, bias=bias)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """q [B, T, d_model], k and v [B, T, kv_heads * head_dim] -> ([B, T, d_model], no cache)."""
        length = q.shape[1]
        q, k, v = (x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for x in (q, k, v))
        longest = max(length, self.config.max_sequence_length)
        table = rope_table(longest, self.config.head_dim, self.config.rope_theta, q.device)
        cos, sin = (x[:length] for x in table)
        q, k = (rotate(x.float(), cos, sin).to(x.dtype) for x in (q, k))
        return self.attn_out(attend(q, k, v, attention_bias)), None

    def forward(
        self, x: torch.Tensor, attention_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        n = self.attn_norm(x)
        out, cache = self.attention(self.q_proj(n), self.k_proj(n), self.v_proj(n), attention_bias)
        x = x + out
        n = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(n)) * self.up_proj(n)), cache


class LLaDAModel(nn.Module):
    """Embedding, blocks, final norm and head, under the official checkpoints' names."""

    transformer: Any

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        layers: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            layers["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)
        self.transformer = nn.ModuleDict(layers)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and not bool(attention_mask.all()):
            hidden = attention_mask[:, None, None, :].to(torch.bool).logical_not()
            mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
            attention_bias = mask if attention_bias is None else attention_bias + mask
        states: list[torch.Tensor] = []
        for block in self.transformer["blocks"]:
            if output_hidden_states:
                states.append(x)
            x, _ = block(x, attention_bias)
        x = self.transformer["ln_f"](x)
        tied = self.config.weight_tying
        if tied and self.transformer["wte"].weight.device != x.device:
            raise ValueError(
                f"LLaDAModelLM: its tied embedding is on {self.transformer['wte'].weight.device} "
                f"and serves as the head on {x.device}; takes it there"
            )
        logits = F.linear(x, self.transformer["wte"].weight) if tied else self.transformer["ff_out"](x)
        return logits, (*states, x) if output_hidden_states else None


class LLaDAModelLM(DiffusionModel):
    """LLaDA with its language-model head. ``forward`` gives logits [B, S, vocab] for every position."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the token embedding."""
        self.model.transformer["wte"] = value
        self.config.embedding_size = value.weight.shape[0]  # which may have been resized

    def get_output_embeddings(self) -> nn.Module:
        """The head; the token embedding where the two are tied."""
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head."""
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of every position, bidirectional.

        Args:
            input_ids: [B, S] int64; or ``inputs_embeds`` [B, S, d_model].
            attention_mask: [B, S], 0 where a position is padding (no query attends to it).
            attention_bias: broadcastable to [B, heads, S, S], added to the scores.
            **unused: arguments of other models that a caller may pass empty (``past_key_values``,
                ``labels``, ...); a value is a ``ValueError``.
        """
        self._refuse(unused)
        self._one_input(input_ids, inputs_embeds)
        logits, states = self.model(
            input_ids, inputs_embeds, attention_mask, attention_bias, output_hidden_states
        )
        if return_dict is False:
            return (logits,) if states is None else (logits, states)
        return CausalLMOutputWithPast(logits=logits, hidden_states=states)
