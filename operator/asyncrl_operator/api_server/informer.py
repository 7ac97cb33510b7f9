"""Copies of what the API server holds, kept up to date: one list, then a watch, for one kind of object.

A pass reads only these stores. They never go back in time: what we have written is put in at once, and news
that is older than what is held is dropped.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from asyncrl_api.job import KIND
from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.resources import JOB_LABEL, Json, Resource
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

PAGE_SIZE = 500
WATCH_SECONDS = 290
"""The time after which the server ends a watch; the next one begins where it ended."""
RESYNC_SECONDS = 600.0
"""The time after which everything is listed again, in case a watch has lost something."""
FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 5.0
"""Short, since old news leads to wrong decisions; the API server sheds load by itself (429)."""
MAX_SAID = 100
"""The number of objects that are not understood of which it is remembered that this was said."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """An object as the store keeps it."""

    namespace: str
    name: str
    uid: str
    version: int
    """`metadata.resourceVersion`; the versions of one kind are in order (KEP-5504)."""
    job: str
    """The label `asyncrl.dev/job`, or the name of the owning AsyncRLJob if it was removed, or empty."""
    owner: str
    """The UID of the object's controller, or empty."""
    is_deleting: bool
    value: T

    @property
    def key(self) -> Key | None:
        """The AsyncRLJob that the object belongs to."""
        return Key(self.namespace, self.job) if self.job else None


class Store(Generic[T]):
    """The objects of one kind, also by job.

    Args:
        trim: returns what is kept of an object.
    """

    def __init__(self, trim: Callable[[Json], T]) -> None:
        self._trim = trim
        self._entries: dict[tuple[str, str], Entry[T]] = {}
        self._by_job: dict[Key, dict[str, Entry[T]]] = {}
        self._said: dict[tuple[str, str], str] = {}
        self._position = 0
        """The version up to which list and watch have reported everything."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries.values())

    def get(self, namespace: str, name: str) -> Entry[T] | None:
        return self._entries.get((namespace, name))

    def of(self, key: Key) -> list[Entry[T]]:
        """Return the objects that have the label of a job, by name."""
        found = self._by_job.get(key, {})
        return [found[name] for name in sorted(found)]

    def put(self, raw: Json) -> Entry[T] | None:
        """Take in an object; return its entry if anything that is kept has changed.

        An object that is not understood is left out, and what is held of it stays: it concerns one job at
        most, and the others go on.
        """
        try:
            entry = self._entry(raw)
        except Exception as error:
            self._left_out(raw, error)
            return None
        place = (entry.namespace, entry.name)
        old = self._entries.get(place)
        if old is not None and old.version >= entry.version:
            return None
        if old is not None and old.key != entry.key:
            self._unlink(old)
        self._entries[place] = entry
        if entry.key is not None:
            self._by_job.setdefault(entry.key, {})[entry.name] = entry
        is_same = old is not None and (old.value, old.uid, old.is_deleting) == (
            entry.value,
            entry.uid,
            entry.is_deleting,
        )
        return None if is_same else entry

    def put_written(self, raw: Json) -> Entry[T] | None:
        """Take in the answer to a write of ours; return its entry if anything that is kept has changed.

        Only what the watch has not reached yet is taken in: the watch may have reported its deletion already,
        and the object would come back forever. What is taken in is no longer news when the watch reports it.
        """
        if int(raw["metadata"]["resourceVersion"]) <= self._position:
            return None
        return self.put(raw)

    def remove(self, raw: Json) -> Entry[T] | None:
        """Take out an object that a watch reports as deleted; return it, unless a newer one has its name."""
        metadata = raw["metadata"]
        held = self._entries.get((metadata.get("namespace", ""), metadata["name"]))
        version = int(metadata["resourceVersion"])
        if held is None or (held.version > version and held.uid != metadata["uid"]):
            return None
        return self._drop(held)

    def discard(self, namespace: str, name: str) -> None:
        """Take out an object that does not exist according to the API server."""
        if (held := self.get(namespace, name)) is not None:
            self._drop(held)

    def advance(self, version: int) -> None:
        """Note that the watch has reported everything up to a version."""
        self._position = max(self._position, version)

    def sweep(self, listed: set[tuple[str, str]], version: int) -> list[Entry[T]]:
        """Take out the objects that a list of that version does not have (namespace, name); return them."""
        gone = [
            entry
            for place, entry in self._entries.items()
            if place not in listed and entry.version <= version
        ]
        for entry in gone:
            self._drop(entry)
        self.advance(version)
        return gone

    def _entry(self, raw: Json) -> Entry[T]:
        metadata = raw["metadata"]
        owners = metadata.get("ownerReferences") or ()
        controller: Json = next((each for each in owners if each.get("controller")), {})
        owned = controller.get("name", "") if controller.get("kind") == KIND else ""
        return Entry(
            namespace=metadata.get("namespace", ""),
            name=metadata["name"],
            uid=metadata["uid"],
            version=int(metadata["resourceVersion"]),
            job=str((metadata.get("labels") or {}).get(JOB_LABEL, owned)),
            owner=controller.get("uid", ""),
            is_deleting="deletionTimestamp" in metadata,
            value=self._trim(raw),
        )

    def _left_out(self, raw: Json, error: Exception) -> None:
        """Say once of an object that it is not understood."""
        metadata = raw["metadata"]
        place = (metadata.get("namespace", ""), metadata["name"])
        why = f"{type(error).__name__}: {error}"
        if self._said.get(place) != why:
            logger.error("%s/%s is not understood, and left out: %s", *place, why)
        self._said = {**dict(list(self._said.items())[-MAX_SAID:]), place: why}

    def _drop(self, entry: Entry[T]) -> Entry[T]:
        del self._entries[(entry.namespace, entry.name)]
        self._unlink(entry)
        return entry

    def _unlink(self, entry: Entry[T]) -> None:
        if entry.key is not None and (of_job := self._by_job.get(entry.key)) is not None:
            of_job.pop(entry.name, None)
            if not of_job:
                del self._by_job[entry.key]


async def fill(
    api: Api, path: str, query: dict[str, str], store: Store[T], on_change: Callable[[Entry[T]], None]
) -> str:
    """List a collection page by page into a store, and return the version of the list.

    Raises:
        ApiError: as for all calls; what is in the store by then stays in it.
    """
    listed: set[tuple[str, str]] = set()
    version, token = "", ""
    while not version or token:
        page = await api.list(path, **query, limit=str(PAGE_SIZE), **({"continue": token} if token else {}))
        for item in page:
            listed.add((item["metadata"].get("namespace", ""), item["metadata"]["name"]))
            if (entry := store.put(item)) is not None:
                on_change(entry)
        version, token = page.metadata["resourceVersion"], page.token
    for entry in store.sweep(listed, int(version)):
        on_change(entry)
    return version


class Informer(Generic[T]):
    """Fills a store, and reports what has changed.

    Args:
        namespace: the namespace to watch; None: all.
        on_change: called for each object that is gone, or of which anything that is kept has changed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        namespace: str | None,
        selector: str,
        trim: Callable[[Json], T],
        on_change: Callable[[Entry[T]], None],
        clock: Callable[[], float],
    ) -> None:
        self.store: Store[T] = Store(trim)
        self.resource = resource
        self.synced = asyncio.Event()
        """Set once the first list is in."""
        self.last_sign = clock()
        """When the watch last gave a sign of life: an event, a bookmark, or an error that is retried."""
        self._api = api
        self._path = resource.path(namespace)
        self._query = {"labelSelector": selector} if selector else {}
        self._on_change = on_change
        self._clock = clock
        self._version = ""
        self._listed_at = 0.0

    async def run(self) -> None:
        """List and watch until cancelled; after a break the watch goes on, or everything is listed again."""
        delay = FIRST_RETRY_SECONDS
        while True:
            self.last_sign = self._clock()
            try:
                if not self._version or self._clock() - self._listed_at >= RESYNC_SECONDS:
                    await self._list()
                await self._watch()
                delay = FIRST_RETRY_SECONDS
            except ApiError as error:
                if error.is_expired:
                    logger.info("%s: is listed again: %s", self._path, error)
                    self._version = ""
                    continue
                wait = max(delay, error.retry_after_seconds)
                logger.warning("%s: the watch broke, next try in %.1f s: %s", self._path, wait, error)
                delay = min(delay * 2, MAX_RETRY_SECONDS)
                await asyncio.sleep(wait)
            except Exception:  # of one kind of object; without this watch all jobs would end with the process
                logger.exception("%s: is listed again in %.1f s", self._path, MAX_RETRY_SECONDS)
                self._version = ""
                await asyncio.sleep(MAX_RETRY_SECONDS)

    async def _list(self) -> None:
        version = await fill(self._api, self._path, self._query, self.store, self._on_change)
        self._version, self._listed_at = version, self._clock()
        self.synced.set()

    async def _watch(self) -> None:
        query = self._query | {
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async for event in self._api.watch(self._path, **query):
            self.last_sign = self._clock()
            self._take(event["type"], event["object"])

    def _take(self, kind: str, raw: dict[str, Any]) -> None:
        self._version = raw["metadata"]["resourceVersion"]
        entry = None
        if kind in ("ADDED", "MODIFIED"):
            entry = self.store.put(raw)
        elif kind == "DELETED":
            entry = self.store.remove(raw)
        self.store.advance(int(self._version))
        if entry is not None:
            self._on_change(entry)
