"""Own model classes that load the official checkpoints without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fastdllm_ext.models.llada import LLaDAConfig, LLaDAModelLM

__all__ = ["LLaDAConfig", "LLaDAModelLM"]

AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM):
    _auto.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
