"""Continuous batching: requests enter and leave at any step, and share one forward a turn."""

from fastdllm_ext.engine.engine import Engine, EngineClosed, QueueFull, RequestTooLong
from fastdllm_ext.engine.request import Completion, Request, Update
from fastdllm_ext.engine.statistics import EngineStats

__all__ = [
    "Completion",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "QueueFull",
    "Request",
    "RequestTooLong",
    "Update",
]
