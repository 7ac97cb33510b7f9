"""Who reads the spec as it began where the spec as it is now is meant, or the reverse, is stopped by mypy."""

from pathlib import Path

import mypy.api
import pytest

from asyncrl_api.base import ApiType
from asyncrl_api.marks import field, merge, tree
from asyncrl_api.parsing import SpecError
from asyncrl_api.run_config import RunningSpec
from asyncrl_api.views import computed
from support.messages.samples import make_job
from support.paths import ROOT

SNIPPET = """
from asyncrl_api.run_config import RunningSpec

def read(spec: RunningSpec) -> None:
    spec.live.training.max_steps
    spec.frozen.training.batch_size
    spec.frozen.training.trains_adapters
    spec.live.staleness.max_versions
    spec.frozen.training.max_steps  # wrong: live
    spec.frozen.staleness  # wrong: live
    spec.frozen.rollout.interrupt  # wrong: live
    spec.live.training.batch_size  # wrong: frozen
    spec.live.sampling.group_size  # wrong: frozen
    spec.live.model  # wrong: frozen
"""


@pytest.mark.slow
def test_a_field_is_only_in_the_view_that_its_mark_says(tmp_path: Path) -> None:
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent", str(path)]
    told, _, _ = mypy.api.run([*options, "--cache-dir", str(tmp_path / "cache")])
    lines = SNIPPET.splitlines()
    wrong = [number for number, line in enumerate(lines, start=1) if "# wrong" in line]
    assert [int(line.split(":")[1]) for line in told.splitlines() if "[attr-defined]" in line] == wrong, told


def test_live_is_what_it_became_and_frozen_what_it_was() -> None:
    spec = RunningSpec(make_job("training.maxSteps=5").spec)
    values = spec.live_values()
    longer = merge(values, {"training": {"maxSteps": 9}, "staleness": {"maxVersions": 7}})
    assert spec.take_over(longer) == ""
    assert (spec.live.training.max_steps, spec.live.staleness.max_versions) == (9, 7)
    assert spec.take_over(values) == "spec.training.maxSteps may only grow; it stays 9"
    assert spec.live.staleness.max_versions == values["staleness"]["maxVersions"]
    assert spec.live.training.max_steps == 9
    with pytest.raises(SpecError, match="only fields marked L may change"):
        spec.take_over(merge(values, {"training": {"batchSize": 4, "minibatches": 1}}))
    assert spec.live_values()["training"] == {"maxSteps": 9}
    assert spec.frozen.training.batch_size == make_job().spec.training.batch_size


class Mixed(ApiType):
    """A block whose properties are made of fields of one mark, or of several."""

    fixed: int = field("", mark="R", default=1)
    live: int = field("", mark="L", default=1)

    @property
    def twice_fixed(self) -> int:
        return 2 * self.fixed

    @property
    def twice_live(self) -> int:
        return 2 * self.live

    @property
    def total(self) -> int:
        return self.fixed + self.live


@pytest.mark.parametrize(("is_live", "names"), [(True, ["twice_live"]), (False, ["twice_fixed"])])
def test_a_property_is_in_the_view_of_the_fields_that_it_reads(is_live: bool, names: list[str]) -> None:
    assert [name for name, _ in computed(Mixed, tree(Mixed), is_live)] == names
