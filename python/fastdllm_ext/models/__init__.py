"""Own model classes that load the official checkpoints without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from fastdllm_ext.models.dream import DreamConfig, DreamModel
from fastdllm_ext.models.llada import LLaDAConfig, LLaDAModelLM

__all__ = ["DreamConfig", "DreamModel", "LLaDAConfig", "LLaDAModelLM"]

for _config in (DreamConfig, LLaDAConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    _auto.register(DreamConfig, DreamModel, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM):
    _auto.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
