"""The status of a job whose spec this version of the operator cannot read. Pure."""

from pydantic import ValidationError

from asyncrl_api.status import Status
from asyncrl_operator.decide.status import Fact, renew


def unreadable(before: Status, generation: int, error: ValidationError, now: float) -> Status:
    """Return a status that says what is not understood; a verdict stands, and what runs goes on.

    The API server has checked the spec against its CRD, so it comes of another version than the operator.
    """
    if before.is_true("Finished"):
        return before.model_copy(update={"observed_generation": generation})
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    message = (
        f"spec.{path}: {first['msg']}: the CRD is of another version than the operator; upgrade the operator"
    )
    facts: dict[str, Fact] = {
        "Ready": ("False", "InvalidSpec", message),
        "Stalled": ("True", "InvalidSpec", message),
    }
    conditions = [each for each in before.conditions if each.type not in (*facts, "Reconciling")]
    conditions += [renew(before, kind, fact, generation, now) for kind, fact in facts.items()]
    order = {each.type: place for place, each in enumerate(before.conditions)}
    conditions.sort(key=lambda each: order.get(each.type, -1))
    return before.model_copy(update={"observed_generation": generation, "conditions": tuple(conditions)})
