"""What a refusal of the API server means."""

import json

import pytest

from asyncrl_operator.api_server.api import error_from
from asyncrl_operator.api_server.refusals import Obstacle, check_ownership, is_namespace_ending, obstacle_from
from asyncrl_operator.resources import CONFIG_MAPS


def answer(reason: str, message: str, **details: object) -> bytes:
    return json.dumps({"kind": "Status", "reason": reason, "message": message, "details": details}).encode()


def test_retry_after_is_read_from_header_or_body() -> None:
    body = answer("TooManyRequests", "slow down", retryAfterSeconds=3)
    assert error_from(429, {"Retry-After": "7"}, body).retry_after_seconds == 7
    assert error_from(429, {}, body).retry_after_seconds == 3
    assert error_from(429, {"Retry-After": "Fri, 1 Jan"}, b"").retry_after_seconds == 0


def test_an_answer_that_is_not_json_is_shown_as_it_is() -> None:
    error = error_from(502, {}, b"<html>bad gateway</html>")
    assert error.status == 502 and "bad gateway" in str(error)


def test_an_expired_version_is_told_from_other_errors() -> None:
    assert error_from(410, {}, answer("Expired", "too old resource version")).is_expired
    assert not error_from(409, {}, answer("Conflict", "")).is_expired


@pytest.mark.parametrize(
    ("status", "message", "reason", "needs_user"),
    [
        (403, 'pods "x" is forbidden: exceeded quota: gpus, requested: 8', "QuotaExceeded", False),
        (403, 'jobs.batch is forbidden: User "u" cannot create', "Forbidden", False),
        (400, 'admission webhook "policy.example" denied the request: no', "AdmissionDenied", False),
        (422, 'Job.batch "x" is invalid: spec.template: Required value', "InvalidSpec", True),
        (500, "failed to create typed patch object (x): .spec.foo: field not declared", "InvalidSpec", True),
    ],
)
def test_a_refusal_names_its_reason(status: int, message: str, reason: str, needs_user: bool) -> None:
    obstacle = obstacle_from(error_from(status, {}, answer("", message)))
    assert obstacle is not None
    assert (obstacle.problem.reason, obstacle.needs_user) == (reason, needs_user)
    assert obstacle.problem.message == message, "in the API server's own words"


@pytest.mark.parametrize("status", [404, 409, 429, 500, 503])
def test_what_may_pass_is_no_obstacle(status: int) -> None:
    assert obstacle_from(error_from(status, {}, answer("", "later"))) is None


def test_a_namespace_that_ends_takes_nothing_new() -> None:
    causes = [{"reason": "NamespaceTerminating", "message": "namespace t is being terminated"}]
    assert is_namespace_ending(error_from(403, {}, answer("Forbidden", "x", causes=causes)))
    assert is_namespace_ending(error_from(404, {}, answer("NotFound", 'namespaces "t" not found')))
    assert not is_namespace_ending(error_from(404, {}, answer("NotFound", 'configmaps "t" not found')))


def test_an_object_that_is_not_ours_is_never_taken_over() -> None:
    mine = {"uid": "u1", "kind": "AsyncRLJob", "controller": True}
    check_ownership(CONFIG_MAPS, {"name": "n", "ownerReferences": [mine]}, "u1")
    with pytest.raises(Obstacle) as foreign:
        check_ownership(CONFIG_MAPS, {"name": "n"}, "u1")
    assert foreign.value.problem.reason == "NameConflict" and foreign.value.needs_user
    with pytest.raises(Obstacle) as earlier:
        check_ownership(CONFIG_MAPS, {"name": "n", "ownerReferences": [mine]}, "u2")
    assert earlier.value.problem.reason == "WaitingForPredecessor" and not earlier.value.needs_user
