"""What counts as a difference between a rendered object and the live one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_operator.compare import first_difference, merge_patch


@pytest.mark.parametrize(
    ("wanted", "live", "path"),
    [
        ({"spec": {"replicas": 3}}, {"spec": {"replicas": 3, "minReadySeconds": 0}}, ""),
        ({"spec": {"replicas": 3}}, {"spec": {"replicas": 2}}, ".spec.replicas"),
        ({"data": {"a": "1"}}, {}, ".data"),
        ({"data": {}}, {}, ""),
        ({"a": {"b": 1}}, {"a": 1}, ".a"),
        ({"args": ["a", "b"]}, {"args": ["a"]}, ".args"),
        ({"args": ["a"]}, {"args": ["a", "b"]}, ".args"),
        ({"args": ["a"]}, {"args": ["b"]}, ".args[]"),
        ({"ports": [{"port": 1}]}, {"ports": [{"port": 1, "protocol": "TCP"}]}, ""),
        ({"ports": [{"port": 1}]}, {"ports": [{"port": 2, "protocol": "TCP"}]}, ".ports[].port"),
        ({"a": True}, {"a": False}, ".a"),
    ],
)
def test_the_first_field_that_is_not_as_wanted_is_named(wanted: Any, live: Any, path: str) -> None:
    assert first_difference(wanted, live) == path


def test_owners_that_others_add_are_left_alone() -> None:
    ours, theirs = {"uid": "1", "controller": True}, {"uid": "2", "kind": "Tenant"}
    wanted = {"metadata": {"ownerReferences": [ours]}}
    assert not first_difference(wanted, {"metadata": {"ownerReferences": [theirs, ours | {"name": "n"}]}})
    assert first_difference(wanted, {"metadata": {"ownerReferences": [theirs]}})


json_values = st.recursive(
    st.integers(0, 3) | st.sampled_from(["", "a"]) | st.booleans(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=8,
)
json_maps = st.dictionaries(st.sampled_from("abc"), json_values, max_size=3)


@given(json_maps)
def test_an_object_does_not_differ_from_itself(document: dict[str, Any]) -> None:
    assert first_difference(document, document) == "" and merge_patch(document, document) == {}


def apply_merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_merge_patch(result.get(name), value)
    return result


@given(json_maps, json_maps)
def test_a_merge_patch_leads_from_one_document_to_the_other(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert apply_merge_patch(old, merge_patch(old, new)) == new
