"""Models and tokenizers, told apart by a few letters."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

__all__ = ["of_model", "of_tokenizer", "of_values"]

SAMPLES = 256  # of each parameter: training changes nearly all of its numbers


def of_values(*values: Any) -> str:
    """Of what JSON can hold."""
    text = json.dumps(values, sort_keys=True)
    return _short(hashlib.sha256(text.encode()))


def of_model(model: nn.Module) -> str:
    """Of weights: names, shapes, and numbers of each, evenly spread. Reads little of a large model."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        if type(weight) is nn.Parameter:  # quantised ones may not let themselves be indexed
            flat = weight.detach().reshape(-1)
            digest.update(flat[:: -(-len(flat) // SAMPLES) or 1].float().cpu().numpy().tobytes())
    return _short(digest)


def of_tokenizer(tokenizer: Any) -> str:
    """Of vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return of_values(rules, getattr(tokenizer, "chat_template", None))


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])
