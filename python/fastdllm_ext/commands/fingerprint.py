"""Models and tokenizers, told apart by a few letters."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from fastdllm_ext.shards import local

__all__ = ["of_model", "of_tokenizer", "of_values"]

SAMPLES = 256  # of each parameter: training changes nearly all of its numbers


def of_values(*values: Any) -> str:
    """Of what JSON can hold."""
    text = json.dumps(values, sort_keys=True)
    return _short(hashlib.sha256(text.encode()))


def of_model(model: nn.Module) -> str:
    """Of weights: names, shapes, and numbers of each, evenly spread. Reads little of a large model.

    Of a model that is split over processes, the numbers are those that are here.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        here = local(weight)
        if type(here) in (nn.Parameter, Tensor):  # quantised ones may not let themselves be indexed
            flat = here.detach().reshape(-1)
            digest.update(flat[:: -(-len(flat) // SAMPLES) or 1].float().cpu().numpy().tobytes())
    return _short(digest)


def of_tokenizer(tokenizer: Any) -> str:
    """Of vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else tokenizer.get_vocab()
    return of_values(rules, getattr(tokenizer, "chat_template", None))


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])
