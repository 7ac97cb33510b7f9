"""A folder in Git that Argo CD's own engine applies and compares with what there is."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.parsing import render_yaml
from support.cluster.control_plane import Cluster
from support.paths import ROOT

HEALTH = ROOT / "gitops" / "argocd" / "health.lua"


class Repository:
    """A folder in Git, and the application that is synced from it."""

    def __init__(self, cluster: Cluster, folder: Path, namespace: str, how: tuple[str, ...]) -> None:
        if not (cluster.programs / "gitops").exists():
            pytest.skip("the kit has no `gitops`: Argo CD's engine is not asked")
        self._cluster = cluster
        self._folder = folder
        self._common = ["--namespace", namespace, "--lua", f"asyncrl.dev/AsyncRLJob={HEALTH}"]
        self._how = how

    def write(self, name: str, manifest: dict[str, Any]) -> None:
        (self._folder / f"{name}.yaml").write_text(render_yaml(manifest))

    def remove(self, name: str) -> None:
        (self._folder / f"{name}.yaml").unlink()

    def sync(self) -> None:
        self._gitops("sync", *self._how)

    def compare(self, kind: str) -> dict[str, Any]:
        """Return what Argo CD says of the one object of a kind."""
        [found] = [each for each in self._gitops("compare") if f"/{kind}/" in each["resource"]]
        return found

    def stands(self) -> tuple[str, str]:
        """Return sync state and health of the job."""
        found = self.compare("AsyncRLJob")
        return found["sync"], found["health"]

    def _gitops(self, verb: str, *options: str) -> list[dict[str, Any]]:
        done = self._cluster.run("gitops", verb, str(self._folder), *self._common, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]
