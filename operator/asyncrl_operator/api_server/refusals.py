"""Refusals by the API server, and objects in the way: what they mean to the user. Pure."""

from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.observed import Problem
from asyncrl_operator.resources import ASYNCRL_JOBS, Json, Resource


class Obstacle(Exception):
    """The API server, or an object in the way, keeps the operator from doing what the spec asks for.

    Args:
        needs_user: nothing is tried until the spec changes or the obstacle is gone (Stalled); otherwise the
            operator tries the same again (a quota may be raised).
    """

    def __init__(self, problem: Problem, *, needs_user: bool) -> None:
        super().__init__(problem.message)
        self.problem = problem
        self.needs_user = needs_user


class Gone(Exception):
    """The AsyncRLJob of this pass, or its namespace, is gone or being deleted: nothing may be created."""


def check_ownership(resource: Resource, metadata: Json, uid: str) -> None:
    """Check that an object with a name that we need is ours. One that is not is never taken over.

    Raises:
        Obstacle: it belongs to an earlier AsyncRLJob of the same name, whose deletion is waited for, or to
            somebody else.
    """
    owners = metadata.get("ownerReferences") or ()
    if any(each["uid"] == uid and each.get("controller") for each in owners):
        return
    what = f"{resource.kind} {metadata['name']}"
    if any(each["kind"] == ASYNCRL_JOBS.kind for each in owners):
        text = f"{what} of an earlier job of this name is still there"
        raise Obstacle(Problem(reasons.WAITING_FOR_PREDECESSOR, text), needs_user=False)
    text = f"{what} exists and was not made for this job: rename or delete one of the two"
    raise Obstacle(Problem(reasons.NAME_CONFLICT, text), needs_user=True)


def obstacle_from(error: ApiError) -> Obstacle | None:
    """Return what a refusal means to the user; None if it has nothing to do with the spec."""
    message = error.message
    if "metadata.uid: Invalid value" in message:  # replaced since the pass saw it: the next sees the other
        return None
    if error.status == 403 and "exceeded quota" in message:
        return Obstacle(Problem(reasons.QUOTA_EXCEEDED, message), needs_user=False)
    if "admission webhook" in message or "ValidatingAdmissionPolicy" in message:
        return Obstacle(Problem(reasons.ADMISSION_DENIED, message), needs_user=False)
    if error.status == 403:
        return Obstacle(Problem(reasons.FORBIDDEN, message), needs_user=False)
    if error.status == 422 or "failed to create typed patch object" in message:
        return Obstacle(Problem(reasons.INVALID_SPEC, message), needs_user=True)
    return None


def is_namespace_ending(error: ApiError) -> bool:
    """Return whether nothing can be created because the namespace is gone or being deleted."""
    return "NamespaceTerminating" in error.causes or (
        error.status == 404 and error.message.startswith("namespaces ")
    )
