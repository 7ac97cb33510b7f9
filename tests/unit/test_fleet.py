"""Who is alive, and which tickets of the dead come back."""

import pytest

from asyncrl_runtime.contract.messages import Heartbeat
from asyncrl_runtime.trainer.reaper import AGAIN_SECONDS, UNHELD_SECONDS, Orphans
from asyncrl_runtime.weights.fleet import BLOCKED_SECONDS, SILENCE_SECONDS, Fleet

GROUP_SIZE = 4


class World:
    """A fleet and its orphans under a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fleet = Fleet(lambda: self.now)
        self.orphans = Orphans(self.fleet, lambda: self.now, GROUP_SIZE)

    def find(self, tickets: list[int], last_delivered: int = 3) -> list[int]:
        return self.orphans.find(tickets, last_delivered)

    def hear(
        self, worker: str, *held: int, late: float = 0.0, state: str = "ready", running: int = 0
    ) -> None:
        self.fleet.heard(
            Heartbeat(
                worker=worker,
                incarnation="i",
                engine="e",
                engine_state=state,
                version=None,
                num_running_samples=running,
                max_running_samples=3 * GROUP_SIZE,
                held=held,
                late_seconds=late,
            )
        )


def test_a_ticket_of_a_worker_that_fell_silent_is_an_orphan() -> None:
    world = World()
    world.hear("a", 1, 2)
    world.hear("b", 3)
    assert world.find([1, 2, 3]) == []
    world.now += SILENCE_SECONDS
    world.hear("b", 3)
    assert [beat.worker for beat in world.fleet.living] == ["b"]
    assert world.find([1, 2, 3]) == [1, 2]


def test_a_delivery_that_nobody_has_told_of_is_an_orphan_after_a_while() -> None:
    """Its worker was killed before its next heartbeat, or came back under the same name."""
    world = World()
    for _ in range(3):
        world.hear("a", 1)
        assert world.find([1, 2]) == []
        world.now += 1
    assert world.find([1, 2]) == [2]


def test_the_wait_between_two_hand_backs_of_a_ticket_doubles() -> None:
    world = World()
    assert world.find([1]) == []
    world.now += UNHELD_SECONDS
    assert world.find([1]) == [1]
    for pause in (10, 20, 40, 80, 160, 160):
        world.now += pause - 0.1
        assert world.find([1]) == []
        world.now += 0.1
        assert world.find([1]) == [1]


def test_a_ticket_that_was_taken_up_and_lost_again_waits_too() -> None:
    """Who is slow rather than dead loses its tickets again and again, and must not get ever more to do."""
    world = World()
    world.find([1])
    world.now += UNHELD_SECONDS
    assert world.find([1]) == [1]
    world.hear("b", 1)
    assert world.find([1]) == []
    world.now += SILENCE_SECONDS
    assert world.find([1]) == []
    world.now += AGAIN_SECONDS - SILENCE_SECONDS
    assert world.find([1]) == [1]


def test_nothing_is_forgotten_of_a_ticket_but_that_it_has_arrived() -> None:
    world = World()
    world.find([1])
    world.now += UNHELD_SECONDS
    assert world.find([1]) == [1]
    assert world.find([]) == []
    world.find([1])
    world.now += UNHELD_SECONDS
    assert world.find([1]) == [1]


def test_a_busy_worker_keeps_what_it_holds_and_may_have_been_given_more() -> None:
    world = World()
    world.hear("a", 1)
    world.find([1, 2])
    for late in range(1, 20):
        world.now += 1
        world.hear("a", 1, late=late)
        assert world.find([1, 2]) == []
    world.hear("a", 1)
    world.find([1, 2])
    world.now += UNHELD_SECONDS
    world.hear("a", 1)
    assert world.find([1, 2]) == [2]


def test_a_worker_that_is_blocked_for_too_long_is_dead_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.hear("a", 1, late=BLOCKED_SECONDS - 1)
    assert world.find([1]) == [] and world.fleet.living
    for late in (BLOCKED_SECONDS, BLOCKED_SECONDS + 1):
        world.hear("a", 1, late=late)
    assert world.find([1]) == [1] and not world.fleet.living
    assert caplog.text.count("worker a has been blocked for 300 s") == 1


def test_who_speaks_seldom_may_be_silent_for_longer() -> None:
    """It may have little of a CPU."""
    world = World()
    world.hear("a", 1)
    world.now += SILENCE_SECONDS - 0.5
    world.hear("a", 1)
    world.now += SILENCE_SECONDS + 2
    assert [beat.worker for beat in world.fleet.living] == ["a"] and world.find([1]) == []
    world.now += 1
    assert world.fleet.living == [] and world.find([1]) == [1]


def test_nobody_is_dead_for_what_could_not_be_heard() -> None:
    """An outage of the broker that lasts longer than a worker may be silent kills nobody."""
    world = World()
    world.hear("a", 1)
    world.find([1, 2])
    world.now += 60
    world.fleet.was_deaf()
    assert world.find([1, 2]) == []
    world.now += 1
    world.hear("a", 1)
    assert world.find([1, 2]) == []
    world.now += UNHELD_SECONDS
    assert world.find([1, 2]) == [2]


def test_what_is_done_with_is_forgotten() -> None:
    world = World()
    world.find([1])
    world.find([])
    world.now += UNHELD_SECONDS
    assert world.find([1]) == []


@pytest.mark.parametrize(
    ("state", "running"), [("draining", 2), ("drained", 0), ("ready", 2 * GROUP_SIZE + 1)]
)
def test_what_no_worker_has_room_for_is_queued_and_not_lost(state: str, running: int) -> None:
    """It was given to a worker that had just begun to drain, and handed it back itself."""
    world = World()
    for _ in range(20):
        world.hear("a", 1, state=state, running=running)
        assert world.find([1, 2]) == []
        world.now += 1
    for _ in range(2):
        world.hear("a", 1, running=GROUP_SIZE)
        assert world.find([1, 2]) == []
        world.now += 1
    world.hear("a", 1, running=GROUP_SIZE)
    assert world.find([1, 2]) == [2]


def test_what_was_passed_over_is_lost_though_no_worker_has_room() -> None:
    """The queue delivers first what was delivered before."""
    world = World()
    for last_delivered in (3, 4, 4):
        world.hear("a", 1, running=3 * GROUP_SIZE)
        assert world.find([1, 2], last_delivered) == []
        world.now += 1
    assert world.find([1, 2], 4) == [2]


def test_what_a_dead_worker_held_comes_back_at_once_though_no_worker_has_room() -> None:
    world = World()
    world.hear("a", 1)
    world.now += SILENCE_SECONDS
    world.hear("b", state="draining")
    assert world.find([1]) == [1]
