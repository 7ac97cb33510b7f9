"""Lets torchvision from PyPI, built for CUDA, be imported beside a torch for CPUs.

Python imports this module at start, and so does each process that SGLang starts. torchvision gives its
operators a meaning for autograd when it is imported, and fails if they were never declared; its library of
compiled operators, which would do so, needs CUDA.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before it is imported; finds nothing itself."""

    declarations: object = None
    """Kept: the declarations go with it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and self.declarations is None:
            import torch

            operators = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for schema in SCHEMAS:
                operators.define(schema)  # type: ignore[no-untyped-call]
            self.declarations = operators
        return None


sys.meta_path.insert(0, DeclareOperators())
