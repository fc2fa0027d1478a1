from __future__ import annotations

import runpy
import warnings
from typing import Any

import pytest
import torch

from fastdllm_ext import compat


def imported_with(monkeypatch: pytest.MonkeyPatch, version: str) -> dict[str, Any]:
    """What compat.py is where transformers has that version; the package's own copy stays as it is."""
    # By name: importing some of its models replaces the module object.
    monkeypatch.setattr("transformers.__version__", version)
    return runpy.run_path(compat.__file__)


@pytest.mark.parametrize("version", ["3.5.1", "4.9.0", "4.45.2"])
def test_an_old_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    wanted = f"transformers {version} is too old; fastdllm_ext supports 4.46 to 5.x"
    with pytest.raises(ImportError, match=wanted):
        imported_with(monkeypatch, version)


def test_a_newer_major_gives_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        UserWarning, match=r"transformers 6.0.0rc1 has not been tried; .* 4.46 to 5.x"
    ) as found:
        imported_with(monkeypatch, "6.0.0rc1")
    assert len(found) == 1


@pytest.mark.parametrize(
    "version, name",
    [("4.46.3", "torch_dtype"), ("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.23.0", "dtype")],
)
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, version: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = imported_with(monkeypatch, version)
    assert module["dtype_argument"](torch.bfloat16) == {name: torch.bfloat16}
