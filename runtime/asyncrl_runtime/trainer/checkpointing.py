"""Makes checkpoints and exports when they are due, and purges from the stream what none of them needs."""

import logging
import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl_api.report import CheckpointReport
from asyncrl_api.spec_views import FrozenSpec
from asyncrl_runtime.contract.broker import TransportError
from asyncrl_runtime.trainer.books.checkpoints import CheckpointFailed, Position
from asyncrl_runtime.trainer.books.spill import Spill
from asyncrl_runtime.trainer.patience import Patience
from asyncrl_runtime.trainer.sealing import sync
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.update.ranks import Export, Save

log = logging.getLogger(__name__)

MIN_FAILED_CHECKPOINTS = 3
FAILING_SECONDS = 600.0
"""The attempt ends, since it could not be resumed where it stands, when at least so many checkpoints in a row
have failed, and for at least so long: a disk may be full for a while."""
RETRY_SECONDS = 30.0
"""How long after a checkpoint that has failed the next is tried, if none is due before."""


class Checkpointing:
    """The checkpoints of one attempt.

    Args:
        restored: the position of the checkpoint that the attempt began with.
        patience: tries again what a disk does not take.
    """

    def __init__(self, parts: AttemptParts, restored: Position | None, patience: Patience) -> None:
        self._parts = parts
        self._books = parts.books
        self._patience = patience
        self._tried_at = parts.clock()
        self._failing_since: float | None = None
        self.seconds = 0.0
        """How long the last checkpoint took that was made; 0 before the first."""
        self._saved: list[Position] = [restored] if restored is not None else []
        self._first_evaluation = restored.first_evaluation if restored is not None else None
        self._num_failed = 0
        self._purged_behind = 0

    @property
    def has_first_evaluation(self) -> bool:
        """Whether the policy was measured before the job's first step."""
        return self._first_evaluation is not None

    async def save_first_evaluation(self, values: dict[str, Any]) -> None:
        """Save that the policy was measured, and with what result, so that the next attempt knows it."""
        self._first_evaluation = values
        await self.save()

    async def save_if_due(self) -> None:
        """Save when it is due (`_reason_to_save`), and export every so many steps."""
        spec, version = self._books.live.checkpoint, self._books.version
        await self.make_room()
        if (reason := self._reason_to_save()) is not None:
            if reason:
                log.warning("checkpoint of step %d: %s", version, reason)
            await self.save()
        if spec.export_every_steps and version % spec.export_every_steps == 0:
            try:
                await self.export(f"step-{version:06d}")
            except OSError as error:  # the job's end makes one in any case
                message = (
                    f"the export of step {version} failed: {error}; the next one is tried when it is due"
                )
                log.error("%s", message)
                self._parts.metrics.update(disk_fault=message)

    def _reason_to_save(self) -> str | None:
        """Return why a checkpoint is due; empty if its time or step has come, None if none is due."""
        spec, waited = self._books.live.checkpoint, self._parts.clock() - self._tried_at
        if disruption := self._parts.disruption():
            return f"a disruption is announced: {disruption}"
        if self._num_failed:
            is_due = waited >= min(RETRY_SECONDS, spec.every_seconds)
        else:
            is_due = waited >= spec.every_seconds
        return "" if is_due or self._books.version % spec.every_steps == 0 else None

    async def save_last(self) -> None:
        """Save, unless the version that has been reached is saved already; try again while the disk fails.

        Raises:
            CheckpointFailed: it has failed for too long, or the trainer is to stop.
        """
        if not self._has_saved_this_version():
            await self._patience.insist("the last checkpoint", lambda: self._make(self.position()))

    async def save_at(self, position: Position) -> None:
        """Save the policy as it was before a step that was stopped half way, if it is not saved already.

        Args:
            position: the books before the step.
        """
        if not self._saved or self._saved[-1].version < position.version:
            await self._make(position)

    async def make_room(self) -> None:
        """Keep a stream that fills up from ending the job: without room for a batch there is no next step.

        First goes what only the older of the two restorable checkpoints needs, into a file beside that one;
        then, with a checkpoint, what lies before the present step.
        """
        if not self._parts.streams.is_nearly_full:
            return
        if self._saved and self._saved[-1].stream_sequence > self._purged_behind:
            await self._spill()
        elif not self._has_saved_this_version():
            log.warning("the trajectory stream is nearly full: checkpoint, to purge behind it")
            await self.save()

    async def _spill(self) -> None:
        """Purge behind the newest checkpoint; what the older one needs is then in a file beside it.

        Raises:
            OSError: the disk has not taken it for too long, or the trainer is to stop.
        """
        older, newest = self._saved[0], self._saved[-1]
        folder = self._parts.checkpoints.folder_of(older.version)
        try:
            if older is not newest:
                what = f"the trajectories of checkpoint {folder.name}"
                await self._patience.insist(what, partial(self._write_spill, folder, older, newest))
        except TransportError as error:
            log.warning("the trajectory stream is nearly full and was not purged: %s", error)
            return
        await self._purge_behind(newest)

    async def _write_spill(self, folder: Path, older: Position, newest: Position) -> None:
        run = self._parts.in_thread
        spill = await run(Spill, folder)
        try:
            after = max(older.stream_sequence, spill.last_sequence)
            async for message in self._parts.streams.stored(after, newest.stream_sequence):
                await run(spill.add, message)
            await run(spill.seal)
        finally:
            await run(spill.discard)
        log.info("%s holds %d bytes of trajectories, which the stream need not", folder, spill.num_bytes)

    async def save(self) -> None:
        """Make a checkpoint now, and let go of what only older ones needed.

        Raises:
            CheckpointFailed: too many have failed in a row, for too long.
        """
        now = self._parts.clock()
        try:
            await self._make(self.position())
        except CheckpointFailed as error:
            self._num_failed += 1
            self._failing_since = now if self._failing_since is None else self._failing_since
            log.error("%s (%d in a row)", error, self._num_failed)
            self._parts.metrics.update(disk_fault=str(error))
            lasted = self._parts.clock() - self._failing_since
            if self._num_failed >= MIN_FAILED_CHECKPOINTS and lasted >= FAILING_SECONDS:
                raise

    async def _make(self, position: Position) -> None:
        """Make the checkpoint of a position, and let go of what only older ones needed.

        Raises:
            CheckpointFailed: it could not be written, or lines before it could not.
        """
        began = self._parts.clock()

        async def save_policy(folder: Path) -> None:
            self._parts.metrics.flush()  # no step before a checkpoint is trained again, so its line is here
            await self._parts.ranks.run(Save(folder))

        try:
            checkpoint = await self._parts.checkpoints.save(
                position, save_policy if position.version > 0 else None
            )
        finally:
            self._tried_at = self._parts.clock()
        self.seconds = self._tried_at - began
        if self._num_failed:
            log.warning("checkpoint %s is made, after %d that failed", checkpoint.folder, self._num_failed)
        self._num_failed, self._failing_since = 0, None
        self._saved = [*[p for p in self._saved if p.version < position.version], position][-2:]
        await self._parts.checkpoints.prune(self._books.live.checkpoint.keep)
        await self._purge_behind(self._saved[0])
        self._parts.metrics.update(
            disk_fault="",
            last_checkpoint=CheckpointReport(
                step=position.version,
                path=str(checkpoint.folder),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )

    async def drop_after(self, version: int) -> None:
        """Delete the checkpoints after `version`, where the surviving history ends: none may be restored."""
        await self._parts.in_thread(self._parts.checkpoints.drop_after, version)

    async def export_last(self) -> Path:
        """Export the trained policy; a disk that fails is waited for, since the training is done.

        Raises:
            OSError: it has failed for too long, or the trainer is to stop.
        """
        return await self._patience.insist("the export of the trained policy", lambda: self.export("final"))

    async def export(self, name: str) -> Path:
        """Write a Hugging Face folder, complete or not at all; return where it is.

        Raises:
            OSError: it could not be written; an earlier one of this name is untouched.
        """
        folder = self._parts.folder / "export" / name
        scratch = folder.with_name(folder.name + ".tmp")
        await self._parts.in_thread(shutil.rmtree, scratch, True)
        try:
            await self._parts.ranks.run(Export(scratch))
            await self._parts.in_thread(_put_in_place, scratch, folder)
        except OSError:
            await self._parts.in_thread(shutil.rmtree, scratch, True)  # it gives its room back
            raise
        return folder

    def _has_saved_this_version(self) -> bool:
        return bool(self._saved) and self._saved[-1].version >= self._books.version

    async def _purge_behind(self, position: Position) -> None:
        self._purged_behind = position.stream_sequence
        await self._parts.streams.purge_behind(position.stream_sequence)

    def position(self) -> Position:
        """Return what a checkpoint made now would say beside the policy."""
        return Position(
            uid=self._parts.uid,
            version=self._books.version,
            began=dict(self._books.began),
            book=self._books.book.record(),
            stream_sequence=self._books.inbox.position,
            trajectory_stream=self._parts.streams.identity,
            origin=origin_of(self._parts.spec),
            first_evaluation=self._first_evaluation,
            rewards=self._books.rewards,
        )


def _put_in_place(scratch: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    sync(folder.parent)


def origin_of(spec: FrozenSpec) -> dict[str, Any]:
    """Return the immutable fields that policy and tickets come from: a checkpoint of others is refused."""
    model = spec.model.model_dump(by_alias=True, include={"source", "revision", "dtype"})
    dataset = spec.dataset.model_dump(
        by_alias=True, include={"source", "split", "parameters", "prompt_field", "seed"}
    )
    return {"model": model, "dataset": dataset, "training": {"seed": spec.training.seed}}
