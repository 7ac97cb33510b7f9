"""Rewards that misbehave, in real processes: what each costs, and that nothing of it stays behind."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from asyncrl_api.job import RewardSpec
from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest, Setup
from asyncrl_runtime.rollout.rewards.pool import RewardNotLoaded, RewardPool
from asyncrl_runtime.rollout.rewards.scorer import Scorer, make_scorer

DAEMON_SECONDS = f"{100_000 + os.getpid()}"
"""The mark by which a process that was left behind is recognized."""

REWARDS = '''
import asyncio, ctypes, os, signal, sys, threading, time
from pathlib import Path

def score(prompt, response, row):
    """Count the call, then do what the row says."""
    with open(row["calls"], "a") as calls:
        calls.write(response + " ")
    return globals()[row["do"]](row)

async def score_async(prompt, response, row):
    await asyncio.sleep(0)
    return score(prompt, response, row)

def one(row): return 1.0
def pair(row): return 0.5, "close"
def hang(row): time.sleep(60)
def nothing(row): return None
def text(row): return "1.0"
def nan(row): return float("nan")
def infinite(row): return float("inf")
def beyond_float32(row): return 1e39
def huge(row): return 10 ** 400
def surrogate(row): return 1.0, "\\udc80"
def raises(row): raise KeyError("gold")
def interrupts(row): raise KeyboardInterrupt
def exits(row): sys.exit(0)
def ends(row): os._exit(3)
def crashes(row): ctypes.string_at(0)
def is_killed(row): os.kill(os.getpid(), signal.SIGKILL)
def kills_its_group(row): os.killpg(0, signal.SIGKILL)
def hangs_up(row): os.closerange(3, 256)
def writes_to_the_socket(row):
    for descriptor in range(3, 256):
        try: os.write(descriptor, b"\\x05\\0\\0\\0garbage")
        except OSError: pass
    hang(row)

def prints(row):
    os.write(1, b"garbage " * 1_250_000)
    print("more")
    os.write(2, b"errors\\n")
    return 1.0

def closes_standard_files(row):
    for descriptor in range(3): os.close(descriptor)
    return 1.0

def moves(row):
    folder = row["calls"] + ".d"
    os.mkdir(folder); os.chdir(folder); os.rmdir(folder)
    return 1.0

def pid(row): return os.getpid()

def comes_back_twice(row):
    child = os.fork()
    if child: os.waitpid(child, 0)
    return 1.0

def has_torch(row): return float("torch" in sys.modules)

def start_daemon(row):
    """Leave a process behind that has escaped session, group and parent."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.execvp("sleep", ["sleep", "@DAEMON@"])
        os._exit(0)
    os.wait()
    return 1.0

def start_daemon_and_hang(row): start_daemon(row); hang(row)
def start_daemon_and_end(row): start_daemon(row); os._exit(3)

def starts_a_thread(row):
    threading.Thread(target=time.sleep, args=[60]).start()
    return 1.0

def fails_once(row):
    if Path(row["calls"]).read_text().split() == ["a"]: raise ConnectionError
    return 1.0

def tell_and_hang(row):
    start_daemon(row)
    Path(row["calls"]).with_name("told").write_text("daemon started")
    hang(row)
'''.replace("@DAEMON@", DAEMON_SECONDS)


@dataclass(frozen=True)
class Bench:
    """A folder with the user's code, in which the calls of a reward are counted."""

    folder: Path

    def request(self, do: str, name: str = "a") -> ScoreRequest:
        return ScoreRequest("prompt", name, {"do": do, "calls": str(self.folder / "calls")})

    def num_calls(self, name: str = "a") -> int:
        return (self.folder / "calls").read_text().split().count(name)

    def scorer(
        self,
        function: str = "rewards:score",
        *,
        num_processes: int = 1,
        timeout_seconds: float = 30,
        max_attempts: int = 1,
    ) -> Scorer:
        setup = Setup(
            type="Function",
            function=function,
            answer_field="",
            timeout_seconds=timeout_seconds,
            import_paths=[str(self.folder)],
        )
        pool = RewardPool(setup, num_processes=num_processes)
        return Scorer(pool, max_attempts=max_attempts, backoff_seconds=0)


def processes_below(pid: int | None = None) -> set[psutil.Process]:
    return set(psutil.Process(pid).children(recursive=True))


def reward_processes() -> list[psutil.Process]:
    """Return the outer process of each pair in this test's pool; other fixtures have children too."""
    return [
        p for p in psutil.Process().children() if "asyncrl_runtime.rollout.rewards.process" in p.cmdline()
    ]


def daemons() -> list[psutil.Process]:
    """Return the processes that `start_daemon` has left running."""
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", DAEMON_SECONDS]]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """Check after each test that none of its processes is left."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    before = processes_below()
    yield Bench(tmp_path)
    assert processes_below() == before
    assert not daemons()


@pytest.mark.parametrize(
    ("do", "score"), [("one", Score(1.0)), ("pair", Score(0.5, "close")), ("has_torch", Score(0.0))]
)
@pytest.mark.parametrize("function", ["rewards:score", "rewards:score_async"])
async def test_a_function_scores(bench: Bench, function: str, do: str, score: Score) -> None:
    async with bench.scorer(function) as scorer:
        assert await scorer.score([bench.request(do)] * 2) == [score, score]


async def test_scores_come_in_the_order_of_the_requests(bench: Bench) -> None:
    async with bench.scorer(num_processes=2) as scorer:
        dos = ["one", "pair", "raises", "pair"] * 2
        groups = await asyncio.gather(
            *(scorer.score([bench.request(do) for do in dos[shift:] + dos[:shift]]) for shift in range(8))
        )
    rewards = [[o.reward if isinstance(o, Score) else None for o in group] for group in groups]
    expected = [1.0, 0.5, None, 0.5] * 2
    assert rewards == [expected[shift:] + expected[:shift] for shift in range(8)]


async def test_an_empty_list_needs_no_process(bench: Bench) -> None:
    async with bench.scorer() as scorer:
        assert await scorer.score([]) == []


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("nothing", "TypeError: the reward returned None, not a number"),
        ("text", "TypeError: the reward returned '1.0', not a number"),
        ("nan", "ValueError: the reward is nan"),
        ("infinite", "ValueError: the reward is inf"),
        ("beyond_float32", "ValueError: the reward is 1e+39; it must be a finite number within float32"),
        ("huge", "OverflowError"),
        ("surrogate", "UnicodeEncodeError"),
        ("raises", "KeyError: 'gold' ("),
        ("interrupts", "KeyboardInterrupt"),
        ("exits", "SystemExit: 0"),
        ("ends", "ended with status 3"),
        ("crashes", "was killed by signal 11"),
        ("is_killed", "was killed by signal 9"),
        ("kills_its_group", "was killed by signal 9"),
        ("hangs_up", "the reward process ended"),
        ("writes_to_the_socket", "something wrote to our socket: Expected `array`, got `int`"),
        ("start_daemon_and_end", "ended with status 3"),
    ],
)
async def test_a_fault_is_an_error_after_all_attempts_and_costs_no_other_sample_any(
    bench: Bench, caplog: pytest.LogCaptureFixture, do: str, message: str
) -> None:
    requests = [bench.request("one", "b"), bench.request(do, "a"), bench.request("one", "c")]
    async with bench.scorer(max_attempts=3) as scorer:
        before, failed, after = await scorer.score(requests)
    assert (before, after) == (Score(1.0), Score(1.0))
    assert isinstance(failed, RewardFailure)
    assert failed.reason == "reward_error"
    assert message in failed.message
    assert [bench.num_calls(name) for name in "abc"] == [3, 1, 1]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [text.partition(":")[0] for text in warnings] == [f"reward attempt {n} of 3" for n in (1, 2, 3)]
    assert all(message in text for text in warnings)


@pytest.mark.parametrize("do", ["hang", "start_daemon_and_hang"])
async def test_a_hang_is_a_timeout_and_costs_no_other_sample_an_attempt(bench: Bench, do: str) -> None:
    names = "abcdefgh"
    requests = [bench.request(do if name == "c" else "one", name) for name in names]
    async with bench.scorer(timeout_seconds=0.3, max_attempts=2) as scorer:
        outcomes = await scorer.score(requests)
        assert not daemons()
    assert outcomes.pop(2) == RewardFailure("reward_timeout", "no answer in 0.3 s")
    assert outcomes == [Score(1.0)] * 7
    assert [bench.num_calls(name) for name in names] == [1, 1, 2, 1, 1, 1, 1, 1]


async def test_what_failed_once_may_score_the_second_time(bench: Bench) -> None:
    async with bench.scorer(max_attempts=2) as scorer:
        assert await scorer.score([bench.request("fails_once")]) == [Score(1.0)]
    assert bench.num_calls() == 2


@pytest.mark.parametrize(
    "do", ["prints", "closes_standard_files", "moves", "starts_a_thread", "start_daemon"]
)
async def test_a_reward_with_side_effects_scores_like_any_other(bench: Bench, do: str) -> None:
    requests = [bench.request(do, "a"), *[bench.request("one", "b")] * 7]
    async with bench.scorer(timeout_seconds=5) as scorer:
        assert await scorer.score(requests) == [Score(1.0)] * 8
        assert await scorer.score(requests[1:]) == [Score(1.0)] * 7
    assert bench.num_calls("b") == 14


async def test_the_child_of_a_reward_that_forks_does_not_answer(bench: Bench) -> None:
    async with bench.scorer(timeout_seconds=5) as scorer:
        requests = [bench.request(do) for do in ("pid", "comes_back_twice", "pid")]
        first, forked, last = await scorer.score(requests)
    assert forked == Score(1.0)
    assert first == last


async def test_a_process_that_dies_between_two_groups_costs_no_attempt(bench: Bench) -> None:
    async with bench.scorer() as scorer:
        await scorer.score([bench.request("one")])
        (outer,) = reward_processes()
        (inner,) = outer.children()
        inner.kill()
        await asyncio.to_thread(inner.wait)
        assert await scorer.score([bench.request("one")]) == [Score(1.0)]


async def test_callers_wait_while_all_processes_are_busy(bench: Bench) -> None:
    async with bench.scorer(num_processes=2) as scorer:
        groups = await asyncio.gather(*(scorer.score([bench.request("one")] * 8) for _ in range(20)))
        assert groups == [[Score(1.0)] * 8] * 20
        assert len(reward_processes()) == 2


async def test_a_hung_process_does_not_keep_others_from_scoring(bench: Bench) -> None:
    async with bench.scorer(num_processes=2) as scorer:
        hanging = asyncio.create_task(scorer.score([bench.request("hang", "b")]))
        for _ in range(20):
            assert await scorer.score([bench.request("one")]) == [Score(1.0)]
        hanging.cancel()
        await asyncio.wait([hanging])


async def test_a_caller_that_is_cancelled_frees_its_process(bench: Bench) -> None:
    async with bench.scorer() as scorer:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await scorer.score([bench.request("start_daemon_and_hang", "b")])
        assert await scorer.score([bench.request("one")]) == [Score(1.0)]
        assert not daemons()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere:score", "ModuleNotFoundError: No module named 'nowhere'"),
        ("rewards:missing", "AttributeError"),
        ("rewards:sys", "TypeError: rewards:sys is a module, not a callable"),
        ("broken:score", "ZeroDivisionError: division by zero"),
        ("deadly:score", "ended with status 5"),
    ],
)
async def test_a_function_that_cannot_be_loaded_is_told_at_once(
    bench: Bench, function: str, message: str
) -> None:
    (bench.folder / "broken.py").write_text("1 / 0")
    (bench.folder / "deadly.py").write_text("import os; os._exit(5)")
    with pytest.raises(RewardNotLoaded, match=message):
        async with bench.scorer(function, num_processes=2):
            pass


async def test_a_start_that_is_cancelled_leaves_nothing(bench: Bench) -> None:
    os.mkfifo(bench.folder / "told")
    (bench.folder / "slow.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(bench.folder / 'told')!r}).write_text('loading')\n"
        "time.sleep(60)\n"
    )
    start = asyncio.create_task(bench.scorer("slow:score").__aenter__())
    assert await asyncio.to_thread((bench.folder / "told").read_text) == "loading"
    start.cancel()
    await asyncio.wait([start])
    assert start.cancelled()


async def test_code_that_can_no_longer_be_loaded_is_an_error_of_each_sample(bench: Bench) -> None:
    async with bench.scorer() as scorer:
        (bench.folder / "rewards.py").unlink()
        outcomes = await scorer.score([bench.request("ends"), bench.request("one", "b")])
    assert all(isinstance(o, RewardFailure) and o.reason == "reward_error" for o in outcomes)
    assert "No module named 'rewards'" in outcomes[1][1]


async def test_the_manifest_says_which_reward(bench: Bench) -> None:
    spec = RewardSpec(type="Function", function="rewards:score", timeout_seconds=5, max_attempts=1)
    scorer = make_scorer(spec, answer_field="answer", import_paths=[bench.folder], num_processes=1)
    async with scorer:
        assert await scorer.score([bench.request("one")]) == [Score(1.0)]


WORKER = """
import asyncio, sys
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest, Setup
from asyncrl_runtime.rollout.rewards.pool import RewardPool

async def main():
    names = dict(type="Function", function="rewards:score", answer_field="")
    setup = Setup(**names, timeout_seconds=60, import_paths=sys.argv[1:])
    async with RewardPool(setup, num_processes=2) as pool:
        await pool.attempt([ScoreRequest("", "a", {"do": "tell_and_hang", "calls": sys.argv[1] + "/calls"})])

asyncio.run(main())
"""


async def test_processes_end_with_a_worker_that_is_killed(bench: Bench) -> None:
    os.mkfifo(bench.folder / "told")
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, str(bench.folder))
    assert await asyncio.to_thread((bench.folder / "told").read_text) == "daemon started"
    family = processes_below(worker.pid)
    assert len(family) == 5  # two pairs, and a daemon
    worker.kill()
    await worker.wait()
    async with asyncio.timeout(10):
        while any(process.is_running() for process in family):
            await asyncio.sleep(0.01)
