"""Small random models."""

from __future__ import annotations

import random
from typing import Any

import torch

import fastdllm_ext as fd
from fastdllm_ext.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM

VOCAB = 64
MASK, EOS, PAD = 63, 1, 0

# What every official config.json says and the published configuration class does not take for granted.
LLADA_KEYS: dict[str, Any] = {
    "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
    "rope_full_precision": True, "rms_norm_eps": 1e-5, "weight_tying": False, "include_bias": False,
    "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_dropout": 0.0,
    "embedding_dropout": 0.0, "residual_dropout": 0.0, "init_device": "cpu", "use_cache": False,
}  # fmt: skip


def tiny_llada(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    classes: tuple[type, type] = (LLaDAConfig, LLaDAModelLM),
    patched: bool = True,
    **changes: Any,
) -> Any:
    """A LLaDA with random weights, large enough that its choices differ."""
    settings: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": changes.get("n_heads", 4),
        "mlp_hidden_size": 48,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "max_sequence_length": 256,
        "rope_theta": 10000.0,
        "mask_token_id": MASK,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    model = random_model(seed, dtype, classes, LLADA_KEYS | settings | changes)
    return fd.patch(model) if patched else model


def random_model(
    seed: int, dtype: torch.dtype, classes: tuple[type, type], settings: dict[str, Any]
) -> torch.nn.Module:
    """A model of a configuration class and a model class, its weights drawn."""
    torch.manual_seed(seed)
    config_class, model_class = classes
    model = model_class(config_class(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.0 if "wte" in name or "embed" in name else 1.6 / p.shape[1] ** 0.5)
            elif name.endswith("bias"):
                p.normal_(std=0.5)
            else:
                p.uniform_(0.6, 1.4)
    return model.to(dtype).eval()


def tiny_dream(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    classes: tuple[type, type] = (DreamConfig, DreamModel),
    patched: bool = True,
    **changes: Any,
) -> Any:
    """A Dream likewise, with grouped queries."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "mask_token_id": MASK,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    model = random_model(seed, dtype, classes, settings | changes)
    return fd.patch(model) if patched else model


def random_shape(rng: random.Random, model_type: str) -> dict[str, Any]:
    """Settings of a small LLaDA or Dream."""
    heads = rng.choice([1, 2, 4])
    shape = {
        "d_model": heads * rng.choice([8, 16, 24]),
        "n_layers": rng.randint(1, 3),
        "n_heads": heads,
        "n_kv_heads": rng.choice([h for h in (1, 2, 4) if heads % h == 0]),
        "mlp_hidden_size": rng.choice([24, 48]),
    }
    if model_type == "llada":
        return shape | {"weight_tying": rng.random() < 0.2}
    return {standard: shape[own] for standard, own in LLaDAConfig.attribute_map.items() if own in shape}


def random_prompt(rng: random.Random, low: int = 1, high: int = 40) -> torch.Tensor:
    return torch.tensor([rng.randrange(2, MASK) for _ in range(rng.randint(low, high))])


def random_rule(rng: random.Random, gen_length: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"steps": rng.randint(1, gen_length + 3)},
            {"threshold": rng.choice([0.05, 0.1, 0.2, 0.4, 0.9])},
            {"factor": rng.choice([0.5, 1.0, 2.0, 5.0])},
        ]
    )
