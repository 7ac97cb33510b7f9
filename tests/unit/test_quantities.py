"""Quantities and unsaid fields as the API server stores them; tests/cluster/test_manifests.py asks it."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_operator.render.quantities import BINARY, DECIMAL, QUANTITY, canonical, canonical_quantity
from support.manifests.rendered_jobs import SPELLINGS


def amount(text: str) -> Decimal:
    match = QUANTITY.fullmatch(text)
    assert match, text
    suffix = match[2] or ""
    if suffix.endswith("i"):
        return Decimal(match[1]) * Decimal(1024 ** BINARY.index(suffix))
    return Decimal(match[1]).scaleb(DECIMAL[suffix])


@pytest.mark.parametrize(("written", "stored"), SPELLINGS.items())
def test_a_quantity_has_one_spelling(written: object, stored: str) -> None:
    assert canonical_quantity(written) == stored


@given(
    st.decimals(min_value=0, max_value=10**6, places=3).map(lambda number: format(number, "f")),
    st.sampled_from([*BINARY, "m", "k", "M", "G"]),
)
def test_the_spelling_changes_and_the_amount_does_not(number: str, unit: str) -> None:
    written = number + unit
    stored = canonical_quantity(written)
    assert canonical_quantity(stored) == stored
    assert 0 <= amount(stored) - amount(written) < Decimal("0.001")


@pytest.mark.parametrize("value", ["much", "", True, "1 Gi", "1KiB", None])
def test_what_is_no_quantity_is_left_for_the_api_server_to_refuse(value: object) -> None:
    assert canonical_quantity(value) is value


def test_only_what_is_a_quantity_or_says_nothing_is_changed() -> None:
    pod: dict[str, Any] = {
        "metadata": {"labels": {"value": "", "sizes": "1024Mi"}},
        "containers": [
            {
                "args": ["1024Mi", ""],
                "env": [{"name": "A", "value": ""}, {"name": "B", "value": "1024Mi"}],
                "resources": {"limits": {"memory": "1024Mi", "cpu": 2}},
                "tty": False,
                "securityContext": {"privileged": False},
            }
        ],
        "volumes": [{"emptyDir": {"sizeLimit": "2048Mi"}}],
        "automountServiceAccountToken": False,
    }
    assert canonical(pod) == {
        "metadata": {"labels": {"value": "", "sizes": "1024Mi"}},
        "containers": [
            {
                "args": ["1024Mi", ""],
                "env": [{"name": "A"}, {"name": "B", "value": "1024Mi"}],
                "resources": {"limits": {"memory": "1Gi", "cpu": "2"}},
                "securityContext": {"privileged": False},
            }
        ],
        "volumes": [{"emptyDir": {"sizeLimit": "2Gi"}}],
        "automountServiceAccountToken": False,
    }
