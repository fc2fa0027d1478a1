"""Checks of single values: every message names the argument, what came and what is allowed."""

from __future__ import annotations

import math

__all__ = ["check_count", "check_number"]


def check_count(name: str, value: object, least: int = 1) -> None:
    """TypeError or ValueError unless it is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}; takes an int of {least} or more")
    if value < least:
        raise ValueError(f"{name}={value}; takes {least} or more")


def check_number(name: str, value: object, allowed: str, low: float, high: float) -> None:
    """A finite number in (low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}; takes a number {allowed}")
    if not (low < value <= high and math.isfinite(value)):
        raise ValueError(f"{name}={value}; takes a number {allowed}")
