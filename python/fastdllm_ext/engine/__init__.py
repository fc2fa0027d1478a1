"""Continuous batching: requests enter and leave at any step, and share one forward a turn."""

from fastdllm_ext.engine.admission import Admission, RequestTooLong
from fastdllm_ext.engine.engine import Engine, EngineClosed, QueueFull
from fastdllm_ext.engine.request import Completion, Request, Update
from fastdllm_ext.engine.statistics import EngineStats
from fastdllm_ext.engine.team import Team, TeamFailed

__all__ = [
    "Admission",
    "Completion",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "QueueFull",
    "Request",
    "RequestTooLong",
    "Team",
    "TeamFailed",
    "Update",
]
