"""What crosses a process: it survives the wire, is refused where it is not understood, and stays small."""

import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from asyncrl_runtime.contract import messages, staging
from asyncrl_runtime.contract.messages import (
    ControlReply,
    Group,
    GroupPart,
    Message,
    PolicyVersion,
    Sample,
    SampleFailure,
    Ticket,
    Tombstone,
    TurnRecord,
    VersionSpan,
    decode,
    encode,
    floats_from_bytes,
    floats_to_bytes,
    ids_from_bytes,
    ids_to_bytes,
    mask_to_bytes,
)
from support.messages.samples import make_group, make_sample

KINDS = [
    each for each in Message.__subclasses__() if each.__module__ in (messages.__name__, staging.__name__)
]
integers = st.integers(0, 2**63 - 1)
int32s = st.integers(-(2**31), 2**31 - 1)
scalars: SearchStrategy[Any] = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text()
rows = st.dictionaries(
    st.text(),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)),
    max_size=3,
)


def values(hint: Any) -> SearchStrategy[Any]:
    """Return a strategy for the values that a field of this type may have."""
    if hint in SCALARS:
        return SCALARS[hint]
    if hint in MADE_WHOLE:
        return MADE_WHOLE[hint]
    inner = get_args(hint)
    if get_origin(hint) is tuple:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if get_origin(hint) is dict:
        return rows
    if get_origin(hint) in (types.UnionType, Union):
        return st.one_of(*(values(each) for each in inner))
    return st.builds(hint, **{name: values(each) for name, each in get_type_hints(hint).items()})


@st.composite
def samples(draw: st.DrawFn, index: int | None = None) -> Sample:
    ends = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted))
    versions = st.tuples(integers, integers)
    length = ends[-1]
    return Sample(
        index=draw(integers) if index is None else index,
        prompt_ids=ids_to_bytes(draw(st.lists(int32s, min_size=1, max_size=5))),
        response_ids=ids_to_bytes(draw(st.lists(int32s, min_size=length, max_size=length))),
        behavior_logprobs=draw(st.binary(min_size=4 * length, max_size=4 * length)),
        response_mask=mask_to_bytes(draw(st.lists(st.booleans(), min_size=length, max_size=length))),
        version_spans=tuple(VersionSpan(*draw(versions), end) for end in ends),
        reward=draw(SCALARS[float]),
        temperature=draw(SCALARS[float]),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        num_turns=draw(integers),
    )


@st.composite
def outcomes(draw: st.DrawFn, index: int | None = None) -> Sample | SampleFailure:
    if draw(st.booleans()):
        return draw(samples(index))
    place = draw(integers) if index is None else index
    return SampleFailure(index=place, reason=draw(st.text()), message=draw(st.text()))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    size = draw(st.integers(1, 4))
    all_of_it = [draw(outcomes(index)) for index in range(size)]
    return Group(
        ticket=draw(integers),
        group_size=size,
        samples=tuple(each for each in all_of_it if isinstance(each, Sample)),
        failures=tuple(each for each in all_of_it if isinstance(each, SampleFailure)),
        worker=draw(st.text()),
        seconds=draw(SCALARS[float]),
    )


@st.composite
def parts(draw: st.DrawFn) -> GroupPart:
    size = draw(st.integers(1, 4096))
    outcome = draw(outcomes(draw(st.integers(0, size - 1))))
    return GroupPart(ticket=draw(integers), group_size=size, outcome=outcome, worker=draw(st.text()))


@st.composite
def turns(draw: st.DrawFn) -> TurnRecord:
    ends = draw(st.lists(st.integers(1, 9), max_size=2, unique=True).map(sorted))
    length = ends[-1] if ends else 0
    return TurnRecord(
        input_ids=ids_to_bytes(draw(st.lists(int32s, max_size=5))),
        output_ids=draw(st.binary(min_size=4 * length, max_size=4 * length)),
        logprobs=draw(st.binary(min_size=4 * length, max_size=4 * length)),
        version_spans=tuple(VersionSpan(*draw(st.tuples(integers, integers)), end) for end in ends),
        finish_reason=draw(st.sampled_from(["stop", "length", ""])),
    )


SCALARS: dict[Any, SearchStrategy[Any]] = {
    int: integers,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(),
    bytes: st.binary(),
    type(None): st.none(),
}
MADE_WHOLE: dict[Any, SearchStrategy[Any]] = {
    Sample: samples(),
    Group: groups(),
    GroupPart: parts(),
    TurnRecord: turns(),
}
"""The messages whose fields must agree with each other."""


def tag_of(kind: type[Message]) -> str:
    return str(kind.__struct_config__.tag)


@pytest.mark.parametrize("kind", KINDS, ids=tag_of)
@given(data=st.data())
@settings(max_examples=12)
def test_every_message_survives_the_wire(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(values(kind))
    assert decode(encode(message), kind) == message


def test_every_message_says_on_the_wire_what_and_of_which_version_it_is() -> None:
    assert sorted(map(tag_of, KINDS)) == [
        "adapter.v1",
        "adapterpart.v1",
        "commit.v2",
        "drain.v1",
        "evalresult.v1",
        "evalticket.v1",
        "failure.v1",
        "group.v1",
        "grouppart.v1",
        "heartbeat.v1",
        "join.v2",
        "loadstaged.v1",
        "prepare.v2",
        "probe.v1",
        "progress.v1",
        "reply.v1",
        "resume.v1",
        "sample.v1",
        "stage.v1",
        "stagebase.v1",
        "stagedchunk.v1",
        "stagedpolicy.v1",
        "stagehello.v1",
        "stageproof.v1",
        "ticket.v1",
        "tombstone.v1",
        "turn.v1",
        "version.v1",
        "weights.v1",
    ]
    assert msgspec.msgpack.decode(encode(make_sample()))[0] == "sample.v1"


def test_the_wire_format_is_the_one_of_the_first_release() -> None:
    """A recorded message: whoever changes its layout makes running jobs unreadable.

    Fields that came later stand at the end, where an older reader passes over them.
    """
    recorded = (
        "97a867726f75702e76310701919ba973616d706c652e763100c4080100000005000000c40407000000c404000000bf"
        "c4010191930203"
        "01cb3ff8000000000000cb3ff0000000000000a473746f700190a3772d30cb0000000000000000"
    )
    sample = Sample(
        index=0,
        prompt_ids=ids_to_bytes([1, 5]),
        response_ids=ids_to_bytes([7]),
        behavior_logprobs=floats_to_bytes([-0.5]),
        response_mask=mask_to_bytes([True]),
        version_spans=(VersionSpan(attempt=2, version=3, end=1),),
        reward=1.5,
        temperature=1.0,
        finish_reason="stop",
    )
    group = Group(ticket=7, group_size=1, samples=(sample,), worker="w-0")
    assert decode(bytes.fromhex(recorded), Group) == group
    later = "0000"  # Sample's max_new_tokens and longest_turn
    assert encode(group).hex() == recorded.replace("919ba973", "919da973").replace(
        "a473746f7001", f"a473746f7001{later}"
    )


@pytest.mark.parametrize(
    ("data", "kinds", "message"),
    [
        (encode(make_group(1)), [Ticket], r"expected ticket\.v1, got group\.v1"),
        (
            encode(ControlReply(ok=True)),
            [Group, Tombstone],
            r"expected group\.v1 or tombstone\.v1, got reply",
        ),
        (msgspec.msgpack.encode(["reply.v2", True]), [ControlReply], r"expected reply\.v1, got reply\.v2"),
        (msgspec.msgpack.encode(["reply.v1", 1]), [ControlReply], r"Expected `bool`, got `int`"),
        (msgspec.msgpack.encode(["reply.v1"]), [ControlReply], r"at least length 2, got 1"),
        (encode(make_group(1))[:-1], [Group], r"expected group\.v1, got no message: .*truncated"),
        (encode(ControlReply(ok=True)) + b"x", [ControlReply], r"expected reply\.v1, got no message"),
        (b"\x93\xa8reply.v1\xc3\xa1\xff", [ControlReply], r"expected reply\.v1, .* \(13 bytes"),
        (b"", [Group], r"expected group\.v1, got no message: .* \(0 bytes"),
        (b"hello", [Group], r"expected group\.v1, got no message"),
    ],
)
def test_what_is_not_awaited_is_refused_by_name(data: bytes, kinds: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data, *kinds)


def test_one_of_several_kinds_is_told_apart_by_its_tag() -> None:
    for message in (make_group(1), GroupPart(ticket=1, group_size=1, outcome=make_sample())):
        assert decode(encode(message), Group, GroupPart, Tombstone) == message


@pytest.mark.parametrize("kind", KINDS, ids=tag_of)
@given(data=st.data())
@settings(max_examples=3)
def test_older_and_newer_processes_understand_each_other(kind: type[Message], data: st.DataObject) -> None:
    """A field that is added later comes last, with a default, so a message is read with it and without it."""
    message = make_group(1) if kind is Group else data.draw(values(kind))
    wire = msgspec.msgpack.decode(encode(message))
    assert decode(msgspec.msgpack.encode([*wire, "added later"]), kind) == message
    fields = msgspec.structs.fields(kind)
    required = [field.name for field in fields if field.required]
    assert required == [field.name for field in fields[: len(required)]]
    expected = kind(**{name: getattr(message, name) for name in required})
    assert decode(msgspec.msgpack.encode(wire[: len(required) + 1]), kind) == expected


ids, logprobs, mask = ids_to_bytes([7] * 9), floats_to_bytes([-1.0] * 9), mask_to_bytes([True] * 9)
AT_ONCE = (VersionSpan(1, 0, 9),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": ids[:-4]}, "sample 3: versions for 9 tokens, but 32 bytes of response ids, 36 of"),
        ({"response_ids": ids + b"\0"}, "37 bytes of response ids"),
        ({"behavior_logprobs": logprobs + bytes(4)}, "40 of log-probs"),
        ({"behavior_logprobs": logprobs[:-1]}, "35 of log-probs and 2 of mask; must be 4, 4 and 1/8"),
        ({"response_mask": mask[:1]}, "1 of mask"),
        ({"response_mask": mask + b"\0"}, "3 of mask"),
        ({"version_spans": ()}, "versions for 0 tokens"),
        ({"version_spans": (VersionSpan(1, 0, 8),)}, "versions for 8 tokens"),
        ({"prompt_ids": b""}, "sample 3: 0 bytes of prompt ids and 9 response tokens"),
        ({"prompt_ids": b"\0" * 5}, "5 bytes of prompt ids"),
        (
            {"response_ids": b"", "behavior_logprobs": b"", "response_mask": b"", "version_spans": ()},
            "0 response tokens; neither may be empty",
        ),
        ({"version_spans": (VersionSpan(1, 0, 4), VersionSpan(1, 1, 4), *AT_ONCE)}, "do not ascend"),
        ({"version_spans": (VersionSpan(1, 0, 5), VersionSpan(1, 1, 4), *AT_ONCE)}, "do not ascend"),
        ({"version_spans": (VersionSpan(1, 0, 0), *AT_ONCE)}, "do not ascend"),
    ],
)
def test_a_sample_whose_arrays_disagree_does_not_exist(changes: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {
        "index": 3,
        "prompt_ids": ids,
        "response_ids": ids,
        "behavior_logprobs": logprobs,
        "response_mask": mask,
        "version_spans": AT_ONCE,
        "reward": 0.0,
        "temperature": 1.0,
        "finish_reason": "stop",
    }
    sample = Sample(**right)
    with pytest.raises(ValueError, match=message):
        Sample(**(right | changes))
    places = {field.name: place for place, field in enumerate(msgspec.structs.fields(Sample), start=1)}
    wire = msgspec.msgpack.decode(encode(sample))
    for name, value in changes.items():
        wire[places[name]] = value
    with pytest.raises(ValueError, match=message):
        decode(msgspec.msgpack.encode(wire), Sample)


@pytest.mark.parametrize(
    ("sampled", "failed", "size"),
    [([0, 1], [], 3), ([0, 0], [], 2), ([0], [0], 2), ([0], [2], 2), ([], [], 1)],
)
def test_a_group_has_each_of_its_samples_once(sampled: list[int], failed: list[int], size: int) -> None:
    with pytest.raises(ValueError, match=rf"ticket 9: samples \[.*\] of a group of {size}"):
        Group(
            ticket=9,
            group_size=size,
            samples=tuple(map(make_sample, sampled)),
            failures=tuple(SampleFailure(index=index, reason="reward_error") for index in failed),
        )


@pytest.mark.parametrize("index", [-1, 2])
def test_a_part_is_one_of_its_group(index: int) -> None:
    """Otherwise the trainer would put together a group that cannot exist."""
    with pytest.raises(ValueError, match=f"ticket 9: part {index} of a group of 2"):
        GroupPart(ticket=9, group_size=2, outcome=SampleFailure(index=index, reason="reward_error"))


@given(st.lists(int32s))
@settings(max_examples=40)
def test_ids_are_four_little_endian_bytes_each(numbers: list[int]) -> None:
    data = ids_to_bytes(numbers)
    assert data == b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)
    assert ids_from_bytes(data).tolist() == numbers


def test_an_id_beyond_32_bits_is_refused() -> None:
    with pytest.raises(OverflowError):
        ids_to_bytes([2**31])


@given(st.lists(st.floats(width=32, allow_nan=False)))
@settings(max_examples=40)
def test_floats_of_32_bits_are_kept_exactly(numbers: list[float]) -> None:
    assert floats_from_bytes(floats_to_bytes(numbers)).tolist() == numbers
    assert len(floats_to_bytes(numbers)) == 4 * len(numbers)


def test_arrays_are_views_that_cannot_be_written() -> None:
    for view in (ids_from_bytes(ids), floats_from_bytes(logprobs)):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0


@given(st.binary(min_size=2, max_size=2))
def test_bits_behind_the_last_token_count_for_nothing(mask: bytes) -> None:
    """A response of nine tokens has seven of them, which anybody may set."""
    sample = msgspec.structs.replace(make_sample(spans=[(1, 0, 9)]), response_mask=mask)
    assert sample.num_sampled == sample.mask().sum()


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=40)
def test_a_mask_is_one_bit_a_token(bits: list[bool]) -> None:
    sample = make_sample(spans=[(1, 0, len(bits))], mask=bits)
    assert len(sample.response_mask) == -(-len(bits) // 8)
    assert sample.mask().dtype == np.bool_ and sample.mask().tolist() == bits


def test_the_first_token_is_the_lowest_bit() -> None:
    assert mask_to_bytes([True, False, False, True] + [False] * 4 + [True]) == bytes([0b1001, 1])


@pytest.mark.parametrize(
    ("label", "version"),
    [
        ("1.0", (1, 0)),
        ("12.345", (12, 345)),
        ("default", None),
        ("", None),
        (".", None),
        ("1.", None),
        (".1", None),
        ("1", None),
        ("1.2.3", None),
        ("-1.2", None),
        ("1.x", None),
        ("1. 2", None),
        ("\u0661.2", None),
        ("1.\u0662", None),
    ],
)
def test_a_label_names_a_version_or_is_the_engines_own(label: str, version: tuple[int, int] | None) -> None:
    assert PolicyVersion.parse(label) == (None if version is None else PolicyVersion(*version))


@given(integers, integers)
@settings(max_examples=40)
def test_a_version_is_read_from_its_label(attempt: int, version: int) -> None:
    assert PolicyVersion.parse(str(PolicyVersion(attempt, version))) == PolicyVersion(attempt, version)


def test_versions_of_a_later_attempt_come_later() -> None:
    assert PolicyVersion(1, 9) < PolicyVersion(1, 10) < PolicyVersion(2, 0)


@pytest.mark.parametrize("spans", [[(1, 0, 32768)], [(1, v, 1024 * (v + 1)) for v in range(32)]])
def test_a_long_sample_takes_eight_bytes_and_a_bit_per_token(spans: Sequence[tuple[int, int, int]]) -> None:
    """Ids and log-probs are raw, the mask is bits; versions cost by the span, not by the token."""
    sample = make_sample(spans=spans)
    arrays = sample.num_tokens * (4 + 4) + sample.num_tokens // 8
    assert arrays < len(encode(sample)) < arrays + 100 + 8 * len(spans)
