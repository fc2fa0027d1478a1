"""Dream (arXiv 2508.15487): configuration and model, without remote code.

Configuration keys and state-dict names are those of the official checkpoints (Dream-org/Dream-v0-*,
Dream-Coder-v0-*, apple/DiffuCoder-7B-*), so their folders load as they are.

A Dream layer is a Qwen2 layer without a causal mask:

    x = x + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))     n = input_layernorm(x)
    x = x + down_proj(silu(gate_proj(n)) * up_proj(n))                         n = post_attention_layernorm(x)

with biases in q_proj, k_proj and v_proj alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from fastdllm_ext.compat import tied_weights
from fastdllm_ext.models.layers import DiffusionModel, RMSNorm, attend, rotate
from fastdllm_ext.rope import rope_table

__all__ = ["DreamConfig", "DreamModel"]

# What the official checkpoints say, or what their code does where they say nothing. A configuration that says
# otherwise asks for another computation, which this file does not implement.
_REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "attention_bias": True,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


class DreamConfig(PretrainedConfig):
    """Configuration of a Dream model. The defaults are Dream-v0-7B's.

    Keys that select another computation (``hidden_act``, ``rope_scaling``, ``use_sliding_window``,
    ``attention_bias``, ...) are accepted with the official value only; anything else is a ``ValueError``
    that names the key.
    """

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 131072,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = 151666,
        bos_token_id: int | None = 151643,
        eos_token_id: int | list[int] | None = 151643,
        pad_token_id: int | None = 151643,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, value in _REQUIRED.items():
            found = kwargs.get(key)
            if found is not None and found != value:
                raise ValueError(
                    f"DreamConfig: {key}={found!r} is not a Dream model; supported: {key}={value!r}"
                )
        rope = _rope_settings(kwargs)
        kinds = set(kwargs.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise ValueError(
                f"DreamConfig: layer_types={kwargs['layer_types']!r} is not a Dream model; "
                "supported: full_attention"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope.get("rope_theta", 1e6) if rope_theta is None else rope_theta
        self.mask_token_id = mask_token_id
        self.use_cache = use_cache
        if hidden_size % num_attention_heads or num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"DreamConfig: num_attention_heads={num_attention_heads} must divide "
                f"hidden_size={hidden_size} and be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        head_dim = kwargs.pop("head_dim", None)
        if head_dim not in (None, self.head_dim):
            raise ValueError(
                f"DreamConfig: head_dim={head_dim!r} is not a Dream model; supported: hidden_size / "
                f"num_attention_heads = {self.head_dim}"
            )
        for key in ("hidden_act", "use_sliding_window", "attention_dropout"):  # in every official file
            kwargs.setdefault(key, _REQUIRED[key])
        super().__init__(  # type: ignore[call-arg]
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.hidden_size // self.num_attention_heads


def _rope_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes ``rope_scaling`` and ``rope_parameters``, its later name, from ``kwargs``; refuses scaling."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        settings = kwargs.pop(key, None) or {}
        if set(settings) - {"rope_type", "type", "rope_theta"} or any(
            settings.get(name, "default") != "default" for name in ("rope_type", "type")
        ):
            raise ValueError(f"DreamConfig: {key}={settings!r} is not a Dream model; supported: {key}=None")
        found |= settings
    return found


class DreamAttention(nn.Module):
    """Grouped-query attention without a causal mask."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, d, bias=True)
        self.k_proj = nn.Linear(d, kv, bias=True)
        self.v_proj = nn.Linear(d, kv, bias=True)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask))


class DreamMLP(nn.Module):
    """The gated half of a layer."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        d, ff = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, ff, bias=False)
        self.up_proj = nn.Linear(d, ff, bias=False)
        self.down_proj = nn.Linear(ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DreamDecoderLayer(nn.Module):
    """One layer; the formula stands at the top of this file."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config)
        self.mlp = DreamMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DreamBaseModel(nn.Module):
    """Embedding, layers and final norm, under the official checkpoints' names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        cos, sin = self._rotary(x, position_ids)
        states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x)
            x = layer(x, cos, sin, mask)
        x = self.norm(x)
        return x, (*states, x) if output_hidden_states else None

    def _rotary(self, x: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1 or B, 1, S, head_dim / 2] in the activations' dtype, computed in float32."""
        length = longest = x.shape[1]
        if position_ids is not None:
            first, last = (int(end) for end in position_ids.aminmax())
            if first < 0:
                raise ValueError(f"DreamModel.forward: position_ids from {first}; takes 0 and more")
            longest = max(length, last + 1)
        # Powers of two: few different tables, for they are kept.
        longest = 1 << max(longest - 1, 1023).bit_length()
        table = rope_table(longest, self.config.head_dim, self.config.rope_theta, x.device)
        at = slice(length) if position_ids is None else position_ids.to(x.device)
        cos, sin = (part[at].to(x.dtype) for part in table)
        if cos.dim() == 2:
            return cos[None, None], sin[None, None]
        return cos[:, None], sin[:, None]


class DreamModel(DiffusionModel):
    """Dream with its language-model head.

    ``forward`` gives logits [B, S, vocab] for every position, as the head makes them: output i predicts
    token i + 1. Who decodes moves them by one.
    """

    config_class = DreamConfig
    base_model_prefix = "model"
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012
    _tied_weights_keys = tied_weights({"lm_head.weight": "model.embed_tokens.weight"})

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The head; its weight is the embedding's where the two are tied."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | str | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits of every position, bidirectional and unshifted.

        Args:
            input_ids: [B, S] int64; or ``inputs_embeds`` [B, S, hidden_size].
            attention_mask: None or "full": every position attends to every position. [B, S], bool or 0/1:
                no query attends to a position that is 0. [B or 1, heads or 1, S, S] bool: True where a query
                attends to a key.
            position_ids: [B or 1, S] or [S] int64 from 0; None is 0, 1, 2, ...
            inputs_embeds: in place of ``input_ids``.
            output_hidden_states: whether to return the input of every layer and the final norm's output.
            return_dict: False returns a tuple.
            **unused: arguments of other models that a caller may pass empty (``past_key_values``,
                ``labels``, ...); a value is a ``ValueError``.

        Returns:
            MaskedLMOutput with ``logits`` [B, S, vocab_size] in the weights' dtype, and ``hidden_states``.

        Raises:
            ValueError: an argument that is not supported, or not of these shapes.
        """
        self._refuse(unused)
        self._one_input(input_ids, inputs_embeds)
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = _mask(attention_mask, x)
        if position_ids is not None and position_ids.shape not in (
            (x.shape[1],),
            (1, x.shape[1]),
            x.shape[:2],
        ):
            raise ValueError(
                f"DreamModel.forward: position_ids of shape {tuple(position_ids.shape)}; takes "
                f"{tuple(x.shape[:2])}"
            )
        hidden, states = self.model(x, mask, position_ids, bool(output_hidden_states))
        logits = self.lm_head(hidden)
        if return_dict is False:
            return (logits,) if states is None else (logits, states)
        return MaskedLMOutput(logits=logits, hidden_states=states)


def _mask(given: Tensor | str | None, x: Tensor) -> Tensor | None:
    """``attention_mask`` of :meth:`DreamModel.forward` as attention takes it."""
    if given is None or (isinstance(given, str) and given == "full"):
        return None
    takes = f"takes None, 'full', {tuple(x.shape[:2])}, or a bool mask with four dimensions"
    if not isinstance(given, Tensor):
        raise ValueError(f"DreamModel.forward: attention_mask={given!r}; {takes}")
    if given.dim() == 2 and given.shape == x.shape[:2]:
        # Without padding the kernel of a call without a mask, which is the faster one.
        return None if bool(given.all()) else given[:, None, None, :].to(torch.bool)
    if given.dim() == 4 and given.dtype == torch.bool:
        return given
    raise ValueError(
        f"DreamModel.forward: attention_mask of shape {tuple(given.shape)} and {given.dtype}; {takes}"
    )
