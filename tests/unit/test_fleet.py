"""Who is alive, and which tickets of the dead come back."""

from asyncrl_runtime.contract.messages import Heartbeat
from asyncrl_runtime.trainer.reaper import AGAIN_SECONDS, UNHELD_SECONDS, Orphans
from asyncrl_runtime.weights.fleet import SILENCE_SECONDS, Fleet


class World:
    """A fleet and its orphans under a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fleet = Fleet(lambda: self.now)
        self.orphans = Orphans(self.fleet, lambda: self.now)

    def hear(self, worker: str, *held: int) -> None:
        self.fleet.heard(
            Heartbeat(
                worker=worker, incarnation="i", engine="e", engine_state="ready", version=None, held=held
            )
        )


def test_a_ticket_of_a_worker_that_fell_silent_is_an_orphan() -> None:
    world = World()
    world.hear("a", 1, 2)
    world.hear("b", 3)
    assert world.orphans.find([1, 2, 3]) == []
    world.now += SILENCE_SECONDS
    world.hear("b", 3)
    assert [beat.worker for beat in world.fleet.living] == ["b"]
    assert world.orphans.find([1, 2, 3]) == [1, 2]


def test_a_delivery_that_nobody_has_told_of_is_an_orphan_after_a_while() -> None:
    """Its worker was killed before its next heartbeat, or came back under the same name."""
    world = World()
    for _ in range(3):
        world.hear("a", 1)
        assert world.orphans.find([1, 2]) == []
        world.now += 1
    assert world.orphans.find([1, 2]) == [2]


def test_a_ticket_is_handed_back_once_and_again_if_nobody_takes_it() -> None:
    world = World()
    world.now += UNHELD_SECONDS
    assert world.orphans.find([1]) == []
    world.now += UNHELD_SECONDS
    assert world.orphans.find([1]) == [1]
    world.now += AGAIN_SECONDS - 0.1
    assert world.orphans.find([1]) == []
    world.now += 0.1
    assert world.orphans.find([1]) == [1]


def test_a_ticket_that_was_taken_up_and_lost_again_counts_anew() -> None:
    world = World()
    world.orphans.find([1])
    world.now += UNHELD_SECONDS
    assert world.orphans.find([1]) == [1]
    world.hear("b", 1)
    assert world.orphans.find([1]) == []
    world.now += SILENCE_SECONDS
    assert world.orphans.find([1]) == [1]


def test_nobody_is_dead_for_what_could_not_be_heard() -> None:
    """An outage of the broker that lasts longer than a worker may be silent kills nobody."""
    world = World()
    world.hear("a", 1)
    world.orphans.find([1, 2])
    world.now += 60
    world.fleet.was_deaf()
    assert world.orphans.find([1, 2]) == []
    world.now += 1
    world.hear("a", 1)
    assert world.orphans.find([1, 2]) == []
    world.now += UNHELD_SECONDS
    assert world.orphans.find([1, 2]) == [2]


def test_what_is_done_with_is_forgotten() -> None:
    world = World()
    world.orphans.find([1])
    world.orphans.find([])
    world.now += UNHELD_SECONDS
    assert world.orphans.find([1]) == []
