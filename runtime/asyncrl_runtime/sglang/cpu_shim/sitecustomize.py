"""What SGLang needs of this interpreter to start on CPUs.

Python imports this module at start, and so does each process that SGLang starts. Two things stand in its way:

torchvision from PyPI is built for CUDA. It gives its operators a meaning for autograd when it is imported,
and fails if they were never declared; its library of compiled operators, which would do so, needs CUDA.

Its code for adapters asks for pinned memory, which torch has on accelerators alone: where adapters are
sampled with it gets any.
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
"""Of torch, with an argument `pin_memory`."""
UNPINNED = "ASYNCRL_SGLANG_UNPINNED"


class PrepareTorch(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before it is imported; finds nothing itself."""

    declarations: object = None
    """Kept: the declarations go with it."""

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
    """Have torch take memory as it comes, whoever asks for pinned."""

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def call(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
            return make(*arguments, **options)

        return call

    for name in PINNING:
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor: tensor


sys.meta_path.insert(0, PrepareTorch())
