"""Fast decoding of open diffusion language models, without retraining.

import fastdllm_ext as fd

model, tokenizer = fd.load(fd.demo_model_path())
output = fd.generate(model, input_ids, threshold=0.9)
"""

import torch  # noqa: F401  (loads libtorch, which the compiled module links against)

from fastdllm_ext import ops, rules
from fastdllm_ext.cache import OutOfPages, PagedKVCache
from fastdllm_ext.decoding import Commit, GenerationConfig, GenerationOutput, Timings
from fastdllm_ext.engine import Engine
from fastdllm_ext.env import collect_env
from fastdllm_ext.generate import generate
from fastdllm_ext.likelihood import loglikelihood
from fastdllm_ext.load import demo_model_path, load
from fastdllm_ext.memory import memory_needed
from fastdllm_ext.methods import patch, unpatch
from fastdllm_ext.patching.registry import supported_models

__version__ = "0.1.0"

__all__ = [
    "Commit",
    "Engine",
    "GenerationConfig",
    "GenerationOutput",
    "OutOfPages",
    "PagedKVCache",
    "Timings",
    "collect_env",
    "demo_model_path",
    "generate",
    "load",
    "loglikelihood",
    "memory_needed",
    "ops",
    "patch",
    "rules",
    "supported_models",
    "unpatch",
]
