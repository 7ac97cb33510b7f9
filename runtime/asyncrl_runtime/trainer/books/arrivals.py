"""Decides whether a message of the trajectory stream is what was asked for, before anything relies on it.

Whoever has a worker's password may publish into the stream, and what lies there comes again at each restart.
So nothing here raises. A message that is not what was asked for is refused. If it lies under the id that a
worker gives to the outcome of its ticket, then no other outcome can follow (the broker would take it for the
same again), and the ticket is given up; otherwise its ticket stays open.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asyncrl_api.base import MAX_INT
from asyncrl_api.names import ticket_of
from asyncrl_api.sampling_spec import MAX_GROUP_SIZE
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, GroupPart, Sample, Tombstone, decode, ids_from_bytes
from asyncrl_runtime.contract.refused import one_line

REASON = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}", re.ASCII)
"""A reason is a word: it becomes a key of the ledger and of metrics.jsonl."""
UNDECODABLE = "undecodable"

Arrived = Group | GroupPart | Tombstone


@dataclass(frozen=True)
class Expected:
    """What a trainer has asked for, as far as it knows."""

    highest_ticket: int
    """The highest ticket that may be under way."""
    group_size: int
    own_after: int = 0
    """The last ticket that an earlier attempt issued, perhaps with another `groupSize`."""
    attempt: int = 0
    """This attempt; 0: unknown."""
    version: int = 0
    """The highest version that this attempt has sent to an engine."""
    vocabulary_size: int | None = None
    """The number of token ids; None: unknown."""


class Unwanted(NamedTuple):
    """A message that is not what was asked for."""

    kind: str
    why: str
    given_up: Tombstone | None = None
    """The end of its ticket, where no other outcome can follow."""


def examine(message: StreamMessage, asked: Expected) -> Arrived | Unwanted:
    """Return what a message holds, or why it is refused. Never raises."""
    where = f"message {message.sequence} on {message.subject!r}"
    ticket = ticket_of(message.subject)
    if ticket is None:
        return Unwanted("trajectory without a ticket", where)
    if ticket > asked.highest_ticket:
        why = f"{where}: no ticket above {asked.highest_ticket} has been issued"
        return Unwanted("trajectory of a ticket that was never issued", why)
    try:
        arrived = decode(message.data, Group, GroupPart, Tombstone)
        _check(arrived, ticket, asked)
    except ValueError as error:
        given_up = None
        if message.message_id.partition("/")[0] == str(ticket):
            given_up = Tombstone(ticket=ticket, reason=UNDECODABLE, message=one_line(str(error)))
        return Unwanted("trajectory that is not what was asked for", f"{where}: {error}", given_up)
    return _as_it_may_be_told(arrived) if isinstance(arrived, Tombstone) else arrived


def _check(arrived: Arrived, ticket: int, asked: Expected) -> None:
    """Raise ValueError unless a message fits its subject and what was asked for."""
    if arrived.ticket != ticket:
        raise ValueError(f"it is about ticket {arrived.ticket}")
    if isinstance(arrived, Tombstone):
        return
    size = arrived.group_size
    if not 1 <= size <= MAX_GROUP_SIZE or (ticket > asked.own_after and size != asked.group_size):
        raise ValueError(f"a group of {size}; {asked.group_size} samples were asked for")
    outcomes = arrived.samples if isinstance(arrived, Group) else (arrived.outcome,)
    for outcome in outcomes:
        if isinstance(outcome, Sample):
            check_sample(outcome, asked)


def check_sample(sample: Sample, asked: Expected) -> None:
    """Raise ValueError unless a sample can come from an engine of this job."""
    for span in sample.version_spans:
        if not (0 <= span.attempt <= MAX_INT and 0 <= span.version <= MAX_INT):
            raise ValueError(f"sample {sample.index}: version {span.policy_version} cannot be")
        is_own = asked.attempt == span.attempt and span.version > asked.version
        if asked.attempt and (span.attempt > asked.attempt or is_own):
            raise ValueError(
                f"sample {sample.index}: version {span.policy_version} does not exist yet; the latest is "
                f"{asked.attempt}.{asked.version}"
            )
    limit = asked.vocabulary_size or 2**31
    for ids in (sample.prompt_ids, sample.response_ids):
        # As unsigned numbers, the negative ones are the highest: one pass instead of two.
        if np.frombuffer(ids, "<u4").max() >= limit:
            found = ids_from_bytes(ids)
            raise ValueError(
                f"sample {sample.index}: token ids from {found.min()} to {found.max()}; the model has {limit}"
            )
    if not 0 <= sample.temperature < math.inf:
        raise ValueError(f"sample {sample.index}: a temperature of {sample.temperature}")


def _as_it_may_be_told(tombstone: Tombstone) -> Tombstone:
    """Return a tombstone whose reason is a word and whose message is a line."""
    reason = tombstone.reason if REASON.fullmatch(tombstone.reason) else UNDECODABLE
    return Tombstone(
        ticket=tombstone.ticket,
        reason=reason,
        message=one_line(tombstone.message, 1000),
        worker=one_line(tombstone.worker),
    )
