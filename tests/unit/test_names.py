"""Names on the broker, and the numbers that processes end with."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.names import JobNames, ticket_of
from asyncrl_operator.decide.restart_policy import FINAL_CODES
from support.messages.samples import make_job

NAMES = JobNames(job="team_gsm8k")
labels = st.from_regex(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True)


def test_streams_buckets_and_subjects_are_those_of_the_layout() -> None:
    assert NAMES.prompt_stream == "RL_team_gsm8k_PROMPT"
    assert NAMES.trajectory_stream == "RL_team_gsm8k_TRAJ"
    assert NAMES.evaluation_stream == "RL_team_gsm8k_EVAL"
    assert (NAMES.state_bucket, NAMES.lease_bucket) == ("rl_team_gsm8k", "rl_team_gsm8k_lease")
    assert NAMES.prompt(12) == "rl.team_gsm8k.prompt.12"
    assert NAMES.trajectory(12) == "rl.team_gsm8k.traj.12"
    assert NAMES.trajectory(12, 0) == "rl.team_gsm8k.traj.12.0"
    assert NAMES.evaluation("ask", "first.16") == "rl.team_gsm8k.eval.ask.first.16"
    assert NAMES.heartbeat("rollout-0") == "rl.team_gsm8k.hb.rollout-0"
    assert NAMES.control("rollout-0") == "rl.team_gsm8k.weights.rollout-0"
    assert NAMES.announcements == "rl.team_gsm8k.ann"
    assert NAMES.inbox_prefix == "_INBOX_team_gsm8k"


def test_a_prefix_stands_before_subjects_only() -> None:
    names = JobNames.on_shared_server("team", "gsm8k", "8d1f", "a.b")
    assert names.prompt_stream == "RL_team_gsm8k_8d1f_PROMPT"
    assert names.trajectory(12, 0) == "a.b.rl.team_gsm8k_8d1f.traj.12.0"
    assert names.inbox_prefix == "a.b._INBOX_team_gsm8k_8d1f"


@pytest.mark.parametrize("prefix", ["", "a", "a.traj.5"])
def test_a_subject_of_a_trajectory_tells_its_ticket(prefix: str) -> None:
    names = JobNames(job="team_gsm8k", prefix=prefix)
    assert ticket_of(names.trajectory(12)) == ticket_of(names.trajectory(12, 3)) == 12


def all_names(names: JobNames) -> set[str]:
    streams = {names.prompt_stream, names.trajectory_stream, names.evaluation_stream}
    # A bucket is the stream KV_<bucket> on the subjects $KV.<bucket>.>
    buckets = {f"KV_{names.state_bucket}", f"KV_{names.lease_bucket}"}
    subjects = {names.prompt("*"), names.trajectory("*"), names.evaluation("ask", "*")}
    subjects |= {names.heartbeat("*"), names.control("*"), names.announcements, names.inbox_prefix}
    return streams | buckets | subjects


@given(st.tuples(labels, labels), st.tuples(labels, labels))
@settings(max_examples=40)
def test_two_jobs_share_no_name(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Namespace and name are labels without `_`, so that joining them is unambiguous."""
    first, second = (JobNames(job="_".join(each)) for each in (one, other))
    assert (all_names(first) & all_names(second) == set()) == (one != other)
    assert len(all_names(first)) == 12


@given(labels, labels)
@settings(max_examples=40)
def test_names_can_stand_on_the_broker(namespace: str, name: str) -> None:
    for each in all_names(JobNames(job=f"{namespace}_{name}")):
        assert not set(each) & set(" \t/\\>") and ".." not in each


def test_exit_codes_are_those_of_the_documentation() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "DONE": 0,
        "USAGE": 64,
        "UNUSABLE": 65,
        "STEP_FAILED": 74,
        "TRY_AGAIN": 75,
        "REFUSED": 78,
    }


def test_what_is_final_is_final_for_every_process() -> None:
    """The trainer's default in the manifest has the same codes as the rule for other processes."""
    default = make_job().spec.failure_policy.trainer.fatal_exit_codes
    others = {ExitCode.DONE, ExitCode.STEP_FAILED, ExitCode.TRY_AGAIN}
    assert set(default) == FINAL_CODES == set(ExitCode) - others


@pytest.mark.parametrize("code", list(ExitCode))
def test_an_exit_error_carries_its_code_and_reads_as_its_message(code: ExitCode) -> None:
    error = ExitError(code, "spec.model.source: is gone; put it back")
    assert (error.code, str(error)) == (code, "spec.model.source: is gone; put it back")
