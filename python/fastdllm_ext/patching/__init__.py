"""Patching of models that are already loaded."""

from fastdllm_ext.patching.registry import is_patched, patch, supported_models, unpatch

__all__ = ["is_patched", "patch", "supported_models", "unpatch"]
