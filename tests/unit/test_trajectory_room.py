"""What the plan says about the room for trajectories."""

import numpy as np

from asyncrl_api.trajectory_room import BYTES_PER_TOKEN, trajectory_room
from asyncrl_operator.local.cli import render_room
from asyncrl_runtime.contract.messages import Group, encode
from support.messages.samples import make_job, make_sample

PAPER = (
    "training.batchSize=512",
    "sampling.groupSize=16",
    "sampling.maxNewTokens=8000",
    "model.contextLength=9000",
    "training.tokensPerMicroBatch=9000",
    "checkpoint.everySteps=50",
)


def test_a_large_batch_is_told_that_its_stream_forces_checkpoints() -> None:
    room = trajectory_room(make_job(*PAPER).spec)
    assert 500 * 2**20 < room.step_bytes < 700 * 2**20
    assert room.num_steps < 50
    text = render_room(room)
    assert f"storage.size {room.wanted_size}" in text
    size = f"messaging.embedded.storage.size={room.wanted_size}"
    enough = trajectory_room(make_job(*PAPER, size).spec)
    assert enough.num_steps >= enough.wanted_steps == 55
    assert render_room(enough) == ""


def test_tokens_take_as_much_as_is_said() -> None:
    def size(num_tokens: int) -> int:
        spans = [(0, 0, num_tokens)]
        return len(encode(Group(ticket=1, group_size=1, samples=(make_sample(0, spans=spans),))))

    assert np.isclose(size(30_000) - size(10_000), 20_000 * BYTES_PER_TOKEN, rtol=0.01)
