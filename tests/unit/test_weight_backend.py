"""The library by which weights travel, and how a group is left; tested where there is no GPU to try it on."""

from typing import Any

import pytest
import torch.distributed as dist

from asyncrl_api.marks import merge
from asyncrl_api.parsing import parse_spec
from asyncrl_runtime.trainer.assemble import choose_backend
from asyncrl_runtime.weights import group as groups
from support.manifests.smallest import SMALLEST


@pytest.mark.parametrize(
    ("asked_for", "engine", "has_gpu", "chosen"),
    [
        ("Auto", "SGLang", True, "nccl"),
        ("Auto", "SGLang", False, "gloo"),
        ("Auto", "CPU", True, "gloo"),
        ("NCCL", "SGLang", True, "nccl"),
        ("Gloo", "SGLang", True, "gloo"),
    ],
)
def test_nccl_is_the_default_between_gpus(asked_for: str, engine: str, has_gpu: bool, chosen: str) -> None:
    changes = {"weightSync": {"backend": asked_for}, "rollout": {"engine": {"type": engine}}}
    assert choose_backend(parse_spec(merge(SMALLEST["spec"], changes)), has_gpu=has_gpu) == chosen


@pytest.mark.parametrize(("backend", "way"), [("nccl", "aborted"), ("gloo", "destroyed")])
def test_a_communicator_of_nccl_is_aborted(monkeypatch: pytest.MonkeyPatch, backend: str, way: str) -> None:
    """Otherwise it would wait for a peer that is dead."""
    left: list[Any] = []
    monkeypatch.setattr(dist, "get_backend", lambda _: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: left.append(("destroyed", group)))
    monkeypatch.setattr(groups, "_abort_process_group", lambda group: left.append(("aborted", group)))
    one: Any = object()
    groups.leave_group(one)
    assert left == [(way, one)]
