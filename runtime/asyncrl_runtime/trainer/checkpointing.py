"""Makes checkpoints and exports when they are due, and purges from the stream what none of them needs."""

import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyncrl_api.report import CheckpointReport
from asyncrl_api.spec_views import FrozenSpec
from asyncrl_runtime.trainer.books.checkpoints import CheckpointFailed, Position
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.update.ranks import Export, Save

log = logging.getLogger(__name__)

FULL_SECONDS = 3.0
"""How long a batch is waited for while the stream hardly has room for it, before more is purged."""
MAX_FAILED_CHECKPOINTS = 3
"""How many failed checkpoints in a row end the job, since it could not be resumed where it stands."""


class Checkpointing:
    """The checkpoints of one attempt.

    Args:
        restored: the position of the checkpoint that the attempt began with.
    """

    def __init__(self, parts: AttemptParts, restored: Position | None) -> None:
        self._parts = parts
        self._books = parts.books
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
        """Save every so many steps, and at once when the trajectory stream fills up; export when due."""
        spec, version = self._books.live.checkpoint, self._books.version
        if self._parts.streams.is_nearly_full:
            log.warning("the trajectory stream is nearly full: checkpoint, to purge behind it")
            await self.save()
        elif version % spec.every_steps == 0:
            await self.save()
        if spec.export_every_steps and version % spec.export_every_steps == 0:
            await self.export(f"step-{version:06d}")

    async def save_last(self) -> None:
        """Save, unless the version that has been reached is saved already."""
        if not self._has_saved_this_version():
            await self.save()

    async def make_room(self, waited_seconds: float) -> None:
        """Keep a stream that fills up from ending the job: without room for a batch there is no next step.

        What fills the stream may be needed by the older of the two restorable checkpoints alone. That one is
        then given up: if it were restored all the same, its batches would be lost, and the history cut there.

        Args:
            waited_seconds: how long the next batch has been waited for.
        """
        if not self._has_saved_this_version():
            log.warning("the trajectory stream is nearly full: checkpoint, to purge behind it")
            await self.save()
        elif waited_seconds > FULL_SECONDS and self._saved[-1].stream_sequence > self._purged_behind:
            log.warning(
                "the trajectory stream is full, and no batch can form: purged behind the newest checkpoint, "
                "so that it alone can be restored; raise spec.messaging.embedded.storage.size"
            )
            await self._purge_behind(self._saved[-1])

    async def save(self) -> None:
        """Make a checkpoint now, and let go of what only older ones needed.

        Raises:
            CheckpointFailed: MAX_FAILED_CHECKPOINTS have failed in a row.
        """
        position = self._position()

        async def save_policy(folder: Path) -> None:
            await self._parts.ranks.run(Save(folder))

        try:
            checkpoint = await self._parts.checkpoints.save(
                position, save_policy if position.version > 0 else None
            )
        except CheckpointFailed as error:
            self._num_failed += 1
            log.error("%s (%d in a row)", error, self._num_failed)
            self._parts.metrics.update(message=str(error))
            if self._num_failed >= MAX_FAILED_CHECKPOINTS:
                raise
            return
        self._num_failed = 0
        self._saved = [*[p for p in self._saved if p.version < position.version], position][-2:]
        self._parts.checkpoints.prune(self._books.live.checkpoint.keep)
        await self._purge_behind(self._saved[0])
        self._parts.metrics.update(
            last_checkpoint=CheckpointReport(
                step=position.version,
                path=str(checkpoint.folder),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    def drop_after(self, version: int) -> None:
        """Delete the checkpoints after `version`, where the surviving history ends: none may be restored."""
        self._parts.checkpoints.drop_after(version)

    async def export(self, name: str) -> Path:
        """Write a Hugging Face folder, complete or not at all; return where it is."""
        folder = self._parts.folder / "export" / name
        scratch = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        await self._parts.ranks.run(Export(scratch))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        return folder

    def _has_saved_this_version(self) -> bool:
        return bool(self._saved) and self._saved[-1].version >= self._books.version

    async def _purge_behind(self, position: Position) -> None:
        self._purged_behind = position.stream_sequence
        await self._parts.streams.purge_behind(position.stream_sequence)

    def _position(self) -> Position:
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


def origin_of(spec: FrozenSpec) -> dict[str, Any]:
    """Return the immutable fields that policy and tickets come from: a checkpoint of others is refused."""
    model = spec.model.model_dump(by_alias=True, include={"source", "revision", "dtype"})
    dataset = spec.dataset.model_dump(
        by_alias=True, include={"source", "split", "parameters", "prompt_field", "seed"}
    )
    return {"model": model, "dataset": dataset, "training": {"seed": spec.training.seed}}
