"""The quickstart's code under its name, and under the one that it had before."""

import pytest

from asyncrl_runtime.contract.imports import load_object


@pytest.mark.parametrize("name", ["make_model", "make_text_model", "sums", "exact", "is_held_out"])
def test_manifests_with_the_former_name_go_on_resolving(name: str) -> None:
    former = load_object(f"asyncrl_runtime.quickstart:{name}", "spec.model.source")
    assert former is load_object(f"asyncrl_examples.quickstart:{name}", "spec.model.source")
