"""Selection rules beyond ``steps``, ``threshold`` and ``factor``: one file each, named in :data:`RULES`.

docs/decoding.md defines them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdllm_ext.rules.base import Rule
from fastdllm_ext.rules.credit import Credit
from fastdllm_ext.rules.entropy_bound import EntropyBound
from fastdllm_ext.rules.frechet import Frechet
from fastdllm_ext.rules.hierarchical import Hierarchical
from fastdllm_ext.rules.klass import Klass
from fastdllm_ext.rules.wino import Wino

__all__ = ["RULES", "Credit", "EntropyBound", "Frechet", "Hierarchical", "Klass", "Rule", "Wino", "parse"]

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Frechet, EntropyBound, Hierarchical, Klass, Credit, Wino)
}


def parse(value: object) -> Rule:
    """A rule from itself, from ``"name:parameter=value:..."`` or from ``{"name": name, parameter: value}``.

    Raises:
        TypeError, ValueError: no such rule or parameter, or a parameter out of range; the message names it.
    """
    if isinstance(value, Rule):
        return value
    if isinstance(value, str):
        name, *parts = value.split(":")
        found: dict[str, Any] = {}
        for part in parts:
            key, equals, number = part.partition("=")
            if not equals or key in found:
                raise ValueError(f"rule={value!r}; takes name:parameter=value:..., each parameter once")
            found[key] = _number(number)
    elif isinstance(value, Mapping):
        found = dict(value)
        name = found.pop("name", None)
    else:
        raise TypeError(f"rule={value!r}; takes a rule, its name and parameters as a string, or a mapping")
    if name not in RULES:
        raise ValueError(f"rule={value!r}; takes one of {', '.join(RULES)}")
    known = RULES[name].parameters()
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise TypeError(f"{name}: unknown parameter {unknown[0]!r}; takes {', '.join(known)}")
    return RULES[name](**found)


def _number(text: str) -> int | float | str:
    """What is no number stays text, which the rule's own check then refuses by name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
