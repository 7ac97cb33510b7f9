"""The cache of one kind never goes back in time, whatever the order of news."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from asyncrl_operator.api_server.informer import Store
from asyncrl_operator.workqueue import Key

KEY = Key("ns", "gsm8k")


def make(version: int, *, name: str = "a", uid: str = "u1", data: str = "", job: str = "gsm8k") -> Any:
    labels = {"asyncrl.dev/job": job} if job else {}
    owner = {"uid": "owner", "kind": "AsyncRLJob", "name": "gsm8k", "controller": True}
    metadata = {
        "namespace": "ns",
        "name": name,
        "uid": uid,
        "resourceVersion": str(version),
        "labels": labels,
        "ownerReferences": [owner],
    }
    return {"metadata": metadata, "data": data}


def make_store() -> Store[str]:
    return Store(lambda raw: json.dumps(raw["data"]))


def test_an_older_event_never_replaces_a_newer_object() -> None:
    store = make_store()
    store.put_written(make(7, data="ours"))
    assert store.put(make(5, data="past")) is None
    assert [entry.value for entry in store.of(KEY)] == ['"ours"']


def test_only_changes_of_what_is_kept_are_told_but_the_version_moves_with_all() -> None:
    store = make_store()
    assert store.put(make(1, data="x")) is not None
    assert store.put(make(2, data="x")) is None
    held = store.get("ns", "a")
    assert held is not None and held.version == 2
    assert store.put(make(3, data="y")) is not None


def test_a_write_that_is_answered_after_its_object_was_deleted_does_not_bring_it_back() -> None:
    store = make_store()
    store.put(make(5))
    store.remove(make(9))
    store.advance(9)
    store.put_written(make(7))
    assert len(store) == 0


def test_the_end_of_an_earlier_object_does_not_remove_its_successor() -> None:
    store = make_store()
    store.put(make(3))
    store.put_written(make(8, uid="u2"))
    assert store.remove(make(6, uid="u1")) is None
    assert [entry.uid for entry in store.of(KEY)] == ["u2"]


def test_a_list_removes_what_is_gone_but_not_what_was_made_since() -> None:
    store = make_store()
    store.put(make(3, name="old"))
    store.put_written(make(9, name="new"))
    gone = store.sweep({("ns", "other")}, 5)
    assert [entry.name for entry in gone] == ["old"]
    assert [entry.name for entry in store.of(KEY)] == ["new"]


def test_an_object_whose_label_was_removed_still_belongs_to_its_owner() -> None:
    store = make_store()
    store.put(make(1, job="gsm8k"))
    changed = store.put(make(2, job="", data="x"))
    assert changed is not None and changed.key == KEY
    assert [entry.name for entry in store.of(KEY)] == ["a"]


versions = st.permutations(list(range(1, 7)))


@given(versions, st.integers(0, 6))
def test_any_order_of_news_ends_with_the_newest(order: list[int], write: int) -> None:
    store = make_store()
    for version in order:
        take = store.put_written if version == write else store.put
        take(make(version, data=str(version)))
    assert [entry.value for entry in store.of(KEY)] == ['"6"']
