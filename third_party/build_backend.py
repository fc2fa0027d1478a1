"""PEP 517 backend: scikit-build-core, which asks pip for a torch only where the user has none."""

from __future__ import annotations

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

import find_torch

_Settings = dict[str, list[str] | str] | None


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if find_torch.find() else [*requirements, find_torch.FALLBACK]


def get_requires_for_build_wheel(  # type: ignore[no-redef]
    config_settings: _Settings = None,
) -> list[str]:
    """What a wheel build needs beside ``build-system.requires``."""
    return _with_torch(_build.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(  # type: ignore[no-redef]
    config_settings: _Settings = None,
) -> list[str]:
    """What an editable build needs beside ``build-system.requires``."""
    return _with_torch(_build.get_requires_for_build_editable(config_settings))
