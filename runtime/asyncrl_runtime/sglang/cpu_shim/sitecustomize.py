"""Prepares the interpreter so that SGLang can start on CPUs.

Python imports this module at start, in this process and in each one that SGLang starts. Two things would keep
SGLang from starting:

torchvision from PyPI is built for CUDA. When it is imported, it registers how autograd treats its operators,
and fails if they were never declared; its compiled library, which would declare them, needs CUDA.

SGLang's code for adapters asks for pinned memory, which torch has only on accelerators: if adapters are used,
it gets ordinary memory instead.
"""

import functools
import importlib.abc
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


PINNING = ("arange", "empty", "ones", "tensor", "zeros")
"""The functions of torch that have an argument `pin_memory`."""
UNPINNED = "ASYNCRL_SGLANG_UNPINNED"


class PrepareTorch(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before it is imported; finds nothing itself."""

    declarations: object = None
    """The library of declarations, kept because they vanish with it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and self.declarations is None:
            import torch

            operators = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                operators.define(schema)
            self.declarations = operators
            if UNPINNED in os.environ:
                unpin(torch)
        return None


def unpin(torch: Any) -> None:
    """Make torch return ordinary memory when pinned memory is asked for."""

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def call(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
            return make(*arguments, **options)

        return call

    for name in PINNING:
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor: tensor


sys.meta_path.insert(0, PrepareTorch())
