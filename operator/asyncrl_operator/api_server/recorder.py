"""Events on the AsyncRLJob, for `kubectl describe`: repeated words are one Event with a count."""

import hashlib
import logging
from collections.abc import Callable, Iterable

from asyncrl_api.job import API_VERSION, KIND
from asyncrl_api.times import to_text
from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.decide.desired import Event
from asyncrl_operator.resources import EVENTS, Json
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

COMPONENT = "asyncrl-operator"
LONGEST_MESSAGE = 1000


class Recorder:
    """Writes Events. One that cannot be written is logged and lost, since Events are news, not state.

    Args:
        clock: Unix time, seconds.
    """

    def __init__(self, api: Api, clock: Callable[[], float]) -> None:
        self._api = api
        self._clock = clock

    async def record(self, key: Key, uid: str, events: Iterable[Event]) -> None:
        """Write the Events of a pass."""
        for event in events:
            try:
                await self._record(render_event(key, uid, event, self._clock()))
            except ApiError as error:
                logger.warning("%s: Event %s is lost: %s", key, event.reason, error)

    async def _record(self, body: Json) -> None:
        """Create an Event, or raise the count of one that exists: its name is derived from what it says."""
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        try:
            await self._api.create(EVENTS.path(namespace), body)
        except ApiError as error:
            if error.status != 409:
                raise
            path = EVENTS.path(namespace, name)
            count = (await self._api.get(path)).get("count", 1) + 1
            await self._api.merge(path, {"count": count, "lastTimestamp": body["lastTimestamp"]})


def render_event(key: Key, uid: str, event: Event, now: float) -> Json:
    """Return an Event about a job. Its name depends only on the job and on what the Event says."""
    message = event.message[:LONGEST_MESSAGE]
    text = "\0".join((uid, event.type, event.reason, message))
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{key.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}",
            "namespace": key.namespace,
        },
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": key.name,
            "namespace": key.namespace,
            "uid": uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": message,
        "count": 1,
        "firstTimestamp": to_text(now),
        "lastTimestamp": to_text(now),
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": COMPONENT,
    }
