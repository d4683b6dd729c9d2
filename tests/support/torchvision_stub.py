"""timm without torchvision: what timm's models import of it, standing empty.

timm reads torchvision for its data pipelines, and for two names that its models need only when they are asked for. The
builds of torchvision on package indices belong to one torch each, so tests of models must do without.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from torch import nn

__all__ = ["timm"]


class _Names(type):
    """Classes whose unknown attributes are their own names, as members of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """A module in which every name is a class without anything."""

    __path__: list[str] = []  # noqa: RUF012 (as modules have it)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Names(name, (nn.Module,), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def timm() -> Any:
    """The module timm; skips the test module where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (pip install --no-deps timm)", allow_module_level=True)
    stands_in = importlib.util.find_spec("torchvision") is None
    finder = _Finder()
    if stands_in:
        sys.meta_path.append(finder)
    try:
        import timm
    finally:
        if stands_in:
            # Other packages ask whether there is a torchvision: the answer stays no.
            sys.meta_path.remove(finder)
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm
