"""Small random models."""

from __future__ import annotations

import random
from typing import Any

import torch

import fastdllm_ext as fd
from fastdllm_ext.models import LLaDAConfig, LLaDAModelLM

VOCAB = 64
MASK, EOS, PAD = 63, 1, 0


def tiny_llada(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LLaDAModelLM:
    """A patched LLaDA with random weights, large enough that its choices differ."""
    settings: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 48,
        "vocab_size": VOCAB,
        "max_sequence_length": 256,
        "rope_theta": 10000.0,
        "mask_token_id": MASK,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    torch.manual_seed(seed)
    model = LLaDAModelLM(LLaDAConfig(**(settings | changes)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=1.0 if "wte" in name else 1.6 / p.shape[1] ** 0.5)
            else:
                p.uniform_(0.6, 1.4)
    return fd.patch(model.to(dtype).eval())


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
