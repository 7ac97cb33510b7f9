"""Staged weights over a real loopback connection: deltas, lost receivers, damaged chunks, strangers."""

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from asyncrl_runtime.contract import staging
from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.contract.staging import (
    FetchedStage,
    FetchStage,
    FramedSocket,
    ReceiverBase,
    ReceiverHello,
    SenderProof,
    StagedChunk,
    StagedPolicy,
    StagingFailed,
    apply_chunk,
    encode_delta,
    prove,
)
from asyncrl_runtime.receiver.fetching import Transfer
from asyncrl_runtime.receiver.staged_file import StagedFile
from asyncrl_runtime.weights import stage_image
from asyncrl_runtime.weights.bucket import PublishedWeights, describe
from asyncrl_runtime.weights.stage_image import MAX_DELTAS, Stage, StageImage
from asyncrl_runtime.weights.stage_server import StageServer

SECRET = bytes(range(32))
SHAPES = {"a": (30, 7), "b": (64,), "c": (5, 5, 5)}
BUCKETS = (("a", "b"), ("c",))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a bucket of this size."""
    monkeypatch.setattr(stage_image, "CHUNK_BYTES", 64)


class Sender:
    """A trainer: its weights, their image, and the server."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0, secret: bytes = SECRET) -> None:
        torch.manual_seed(seed)
        self.weights = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
        self.layout = tuple(describe([(n, dtype, SHAPES[n]) for n in names]) for names in BUCKETS)
        self.image = StageImage(self.layout, '{"model_type": "none"}', secret)
        self.refusals = Refusals()
        self.server = StageServer("127.0.0.1", secret, self.refusals)
        self.version = PolicyVersion(1, 0)
        self.stage: Stage

    def publish(self, number: int) -> None:
        self.version = PolicyVersion(1, number)
        self.server.withdraw()
        published = PublishedWeights(self.layout, self._gather)
        self.stage = asyncio.run(self.image.advance(self.version, published))
        self.server.offer(self.stage)

    async def _gather(self, names: tuple[str, ...]) -> Tensor:
        return torch.cat([self.weights[name].reshape(-1).view(torch.uint8) for name in names])

    def change(self, num_words: int) -> None:
        """Change a few words, as a small learning rate does."""
        for _ in range(num_words):
            tensor = self.weights[("a", "b", "c")[int(torch.randint(3, ()))]].view(-1)
            tensor[int(torch.randint(len(tensor), ()))] += 1

    def asked(self, secret: bytes = SECRET) -> FetchStage:
        return FetchStage(
            host="127.0.0.1",
            port=self.server.port,
            secret=secret,
            version=self.version,
            timeout_seconds=20,
        )

    def is_at(self, file: StagedFile) -> bool:
        """Whether the file is a safetensors file of the present weights."""
        found = load_file(file.folder / "model.safetensors")
        return file.version == self.version and all(
            torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
            for name, tensor in self.weights.items()
        )


@pytest.fixture
def sender() -> Iterator[Sender]:
    made = Sender()
    yield made
    made.server.close()


def fetch(sender: Sender, file: StagedFile) -> FetchedStage:
    return Transfer(sender.asked(), file).run()


# -- deltas


@given(data=st.data(), word_bytes=st.sampled_from([1, 2, 4]), size=st.integers(0, 300))
def test_a_delta_makes_of_the_old_what_the_new_is(data: st.DataObject, word_bytes: int, size: int) -> None:
    before = np.frombuffer(np.random.default_rng(0).bytes(size * word_bytes), dtype=np.uint8)
    after = before.copy()
    for place in data.draw(st.lists(st.integers(0, max(0, len(after) - 1)), max_size=20)):
        after[place : place + 1] ^= 0x55
    delta = encode_delta(before, after, word_bytes)
    if delta is None:
        return
    payload, num_changed, gap_bytes = delta
    assert len(payload) < len(after)
    chunk = StagedChunk(
        offset=0,
        num_bytes=len(after),
        digest=b"",
        num_changed=num_changed,
        gap_bytes=gap_bytes,
        word_bytes=word_bytes,
    )
    made = before.copy()
    apply_chunk(chunk, np.frombuffer(payload, dtype=np.uint8), made)
    assert np.array_equal(made, after)


def test_a_gap_may_be_wider_than_two_bytes_hold() -> None:
    before = np.zeros(2**18, dtype=np.uint8)
    after = before.copy()
    after[-1] = 1
    delta = encode_delta(before, after, 2)
    assert delta is not None
    assert (len(delta[0]), *delta[1:]) == (6, 1, 4)
    chunk = StagedChunk(offset=0, num_bytes=2**18, digest=b"", num_changed=1, gap_bytes=4, word_bytes=2)
    apply_chunk(chunk, np.frombuffer(delta[0], dtype=np.uint8), before)
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("values", "payload"),
    [
        ({"num_changed": -1}, b"short"),
        ({"num_changed": 1, "gap_bytes": 2, "word_bytes": 2}, b"\x04\x00\x01\x01"),  # beyond the end
        ({"num_changed": 1, "gap_bytes": 3, "word_bytes": 2}, b"\x00\x00\x00\x01\x01"),
        ({"num_changed": 1, "gap_bytes": 2, "word_bytes": 3}, b"\x00\x00\x01\x01\x01"),
        ({"num_changed": 2, "gap_bytes": 2, "word_bytes": 2}, b"\x00\x00\x01\x01"),
        ({"num_changed": 10**12, "gap_bytes": 2, "word_bytes": 2}, b""),
    ],
)
def test_a_chunk_that_is_none_is_refused(values: dict[str, int], payload: bytes) -> None:
    chunk = StagedChunk(offset=0, num_bytes=8, digest=b"", **values)
    with pytest.raises(ValueError, match="chunk at 0"):
        apply_chunk(chunk, np.frombuffer(payload, dtype=np.uint8), np.zeros(8, dtype=np.uint8))


Steps = st.lists(
    st.tuples(st.sampled_from(["sparse", "dense", "nothing"]), st.sets(st.integers(0, 2)), st.booleans()),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(steps=Steps, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_any_receiver_is_at_the_version_after_any_history(
    steps: list[tuple[str, set[int], bool]], dtype: torch.dtype
) -> None:
    """Each step changes the weights; some receivers fetch it, others miss it, one is lost and begins anew."""
    sender = Sender(dtype)
    with TemporaryDirectory() as folder:
        files = [StagedFile(Path(folder) / str(number)) for number in range(3)]
        for number, (kind, who, is_lost) in enumerate(steps):
            if kind == "sparse":
                sender.change(3)
            elif kind == "dense":
                sender.weights = {name: each + 1 for name, each in sender.weights.items()}
            sender.publish(number)
            if is_lost:
                files[0] = StagedFile(files[0].folder)
            for each in who:
                fetch(sender, files[each])
                assert sender.is_at(files[each])
        for file in files:
            fetch(sender, file)
            assert sender.is_at(file)
    assert sender.refusals.num == 0
    sender.server.close()


def test_who_has_the_version_before_gets_what_has_changed_and_everybody_else_the_whole(
    sender: Sender, tmp_path: Path
) -> None:
    kept, late = StagedFile(tmp_path / "kept"), StagedFile(tmp_path / "late")
    sender.publish(0)
    whole = fetch(sender, kept)
    assert whole.is_whole and whole.num_bytes == (kept.folder / "model.safetensors").stat().st_size
    assert (kept.folder / "config.json").read_text() == '{"model_type": "none"}'
    sender.change(2)
    sender.publish(1)
    delta = fetch(sender, kept)
    assert not delta.is_whole and 0 < delta.num_bytes <= 2 * 4
    assert fetch(sender, late).is_whole
    assert fetch(sender, kept).num_bytes == 0, "it is here already"


def test_after_many_deltas_the_whole_is_sent(sender: Sender, tmp_path: Path) -> None:
    file, whole = StagedFile(tmp_path), []
    for number in range(2 * MAX_DELTAS + 3):
        sender.publish(number)
        whole.append(fetch(sender, file).is_whole)
    assert [number for number, is_whole in enumerate(whole) if is_whole] == [0, 33, 66]


def test_an_image_that_was_broken_off_is_of_no_version(sender: Sender, tmp_path: Path) -> None:
    file = StagedFile(tmp_path)
    sender.publish(0)
    fetch(sender, file)
    sender.change(5)

    async def breaks(names: tuple[str, ...]) -> Tensor:
        if names == BUCKETS[1]:
            raise RuntimeError("a rank is gone")
        return await sender._gather(names)

    with pytest.raises(RuntimeError, match="a rank is gone"):
        asyncio.run(sender.image.advance(PolicyVersion(1, 1), PublishedWeights(sender.layout, breaks)))
    sender.publish(1)
    assert sender.stage.policy.base is None
    assert fetch(sender, file).is_whole and sender.is_at(file)


# -- what goes wrong


def test_a_copy_that_was_damaged_is_replaced_by_the_whole(
    sender: Sender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = StagedFile(tmp_path)
    sender.publish(0)
    fetch(sender, file)
    file._content[-3] ^= 1
    sender.publish(1)
    assert fetch(sender, file).is_whole and sender.is_at(file)
    assert "is damaged, or was made for another base; fetching the whole" in caplog.text


def test_a_chunk_that_is_damaged_on_its_way_comes_again(
    sender: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, send, num_sent = StagedFile(tmp_path), FramedSocket.send, 0
    sender.publish(0)
    fetch(sender, file)
    sender.weights = {name: each + 1 for name, each in sender.weights.items()}
    sender.publish(1)

    def damaged(self: FramedSocket, message: msgspec.Struct, payload: bytes | memoryview = b"") -> None:
        nonlocal num_sent
        num_sent += isinstance(message, StagedChunk)
        if num_sent == 5 and len(payload):
            payload = bytes([payload[0] ^ 1]) + bytes(payload[1:])
        send(self, message, payload)  # type: ignore[arg-type]

    monkeypatch.setattr(FramedSocket, "send", damaged)
    assert fetch(sender, file).is_whole and sender.is_at(file)


def test_what_is_damaged_twice_has_not_come(
    sender: Sender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = StagedFile(tmp_path)
    sender.publish(0)
    fetch(sender, file)
    sender.publish(1)
    monkeypatch.setattr("asyncrl_runtime.receiver.staged_file.digest_of", lambda *_: b"other")
    with pytest.raises(StagingFailed, match="damaged"):
        fetch(sender, file)
    assert file.version is None


def test_a_receiver_without_the_secret_gets_nothing_and_is_told_of(
    sender: Sender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sender.publish(0)
    with socket.create_connection(("127.0.0.1", sender.server.port)) as connected:
        stranger = FramedSocket(connected, 9.0, lambda: 0.0)
        stranger.send(ReceiverHello(nonce=b"n" * 32, version=sender.version))
        proved, _ = stranger.receive(SenderProof)
        stranger.send(ReceiverBase(proof=prove(b"guessed", "receiver", proved.nonce, b"n" * 32), base=None))
        with pytest.raises(StagingFailed):
            stranger.receive(StagedPolicy)
    assert "receiver of weights, 1 so far" in caplog.text
    assert "it does not know the attempt's secret" in caplog.text


def test_a_proof_cannot_be_used_by_the_other_side() -> None:
    assert prove(SECRET, "trainer", b"a", b"b") != prove(SECRET, "receiver", b"a", b"b")
    assert prove(SECRET, "trainer", b"a", b"b") != prove(SECRET, "trainer", b"b", b"a")


def test_a_sender_without_the_secret_is_refused_with_a_word(sender: Sender, tmp_path: Path) -> None:
    """And what was there before stays there, whole."""
    file = StagedFile(tmp_path)
    sender.publish(0)
    fetch(sender, file)
    sender.publish(1)
    with pytest.raises(StagingFailed, match="does not know the attempt's secret, and is refused"):
        Transfer(sender.asked(b"the attempt's before"), file).run()
    assert file.version == PolicyVersion(1, 0)


def test_what_came_with_another_secret_is_not_taken_for_the_version(sender: Sender, tmp_path: Path) -> None:
    """Somebody in the pod had the receiver fetch from elsewhere, under the name of what is to come."""
    file = StagedFile(tmp_path)
    stranger = Sender(seed=1, secret=b"a stranger's")
    stranger.publish(0)
    Transfer(stranger.asked(b"a stranger's"), file).run()
    assert stranger.is_at(file)
    sender.publish(0)
    assert fetch(sender, file).is_whole and sender.is_at(file)
    stranger.server.close()


def test_a_version_that_is_not_offered_is_not_sent(sender: Sender, tmp_path: Path) -> None:
    sender.publish(1)
    asked = msgspec.structs.replace(sender.asked(), version=PolicyVersion(1, 2))
    with pytest.raises(StagingFailed, match="closed"):
        Transfer(asked, StagedFile(tmp_path)).run()


def test_a_trainer_that_is_gone_is_told_of(sender: Sender, tmp_path: Path) -> None:
    sender.server.close()
    with pytest.raises(StagingFailed, match=r"127\.0\.0\.1"):
        Transfer(sender.asked(), StagedFile(tmp_path)).run()


def test_a_transfer_can_be_broken_off(tmp_path: Path) -> None:
    """The other side listens, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        asked = FetchStage(
            host="127.0.0.1", port=port, secret=SECRET, version=PolicyVersion(1, 0), timeout_seconds=60
        )
        transfer = Transfer(asked, StagedFile(tmp_path))

        def give_up() -> None:
            silent.accept()
            transfer.give_up()

        threading.Thread(target=give_up, daemon=True).start()
        with pytest.raises(StagingFailed):
            transfer.run()


def test_a_folder_without_room_says_which_field_to_raise(tmp_path: Path) -> None:
    file = StagedFile(tmp_path)
    with pytest.raises(StagingFailed, match=r"raise spec\.weightSync\.stagingMegabytes"):
        file.begin(StagedPolicy(version=PolicyVersion(1, 0), num_bytes=2**62, config="{}"))
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_receiver_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"half of it")
    assert StagedFile(tmp_path).version is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [(0xFFFFFFFF, 0), (5, 0xFFFFFFFF), (0, 0), (3, 3)])
def test_a_frame_that_is_none_is_refused(sizes: tuple[int, int]) -> None:
    here, there = socket.socketpair()
    there.sendall(b"".join(size.to_bytes(4, "big") for size in sizes) + b"abcdef")
    there.close()
    with FramedSocket(here, 9.0, lambda: 0.0) as frames, pytest.raises(StagingFailed):
        frames.receive(StagedChunk, 10)


def test_what_comes_after_the_deadline_has_not_come() -> None:
    here, there = socket.socketpair()
    there.sendall(b"12345678")
    late = pytest.raises(StagingFailed, match="the deadline has passed")
    with there, FramedSocket(here, 10.0, lambda: 11.0) as frames, late:
        frames.receive(StagedChunk)


def test_every_dtype_that_travels_has_its_name_in_safetensors() -> None:
    assert staging.SAFETENSORS_DTYPES.keys() == staging.ITEM_BYTES.keys()


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
