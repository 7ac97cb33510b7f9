"""Stands in for SGLang's kernel package, which PyPI has only for CUDA: every name exists, none works."""

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

__version__ = "0.4.7"
__path__ = []  # a package without files: Finder finds all its modules

OWN_FALLBACK = "sgl_kernel.scalar_type"
"""The module whose ImportError SGLang handles by itself."""


def stand_in(name: str) -> Callable[..., NoReturn]:
    def kernel(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{name} is a kernel for GPUs: there is none on this machine")

    return kernel


class Kernels(ModuleType):
    """A module that has every function one asks for."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below `sgl_kernel`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("sgl_kernel.") or fullname == OWN_FALLBACK:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Kernels(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: there is no code to run."""


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return stand_in(f"sgl_kernel.{name}")


sys.meta_path.append(Finder())
