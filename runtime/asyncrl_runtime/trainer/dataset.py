"""The training rows and the held-out rows: where they come from, and in which order tickets take them.

To add a source, write a function, enter it in `SOURCES` below, and add its form to
`asyncrl_api.rules.ROW_SOURCES`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import DatasetSpec
from asyncrl_api.spec_views import FrozenEvaluationSpec, FrozenSpec
from asyncrl_runtime.contract.imports import ImportFailed, load_object
from asyncrl_runtime.contract.rows import PromptError, prompt_text

log = logging.getLogger(__name__)

DictRow = dict[str, Any]

REASONING_GYM_ROWS = 10_000
"""The number of rows of a split, unless `parameters.size` sets another."""
REASONING_GYM_SPLIT_DISTANCE = 10**9
"""The distance between the seeds of two splits. In several tasks item i under seed s is `Random(s + i)`, so
that another seed gives a shifted window of the same items. Splits therefore begin far apart, and what they
nevertheless share is excluded by its text."""


@dataclass(frozen=True)
class Rows:
    """The rows that a job trains on, and those that it is evaluated with."""

    training: tuple[DictRow, ...]
    """The rows to train on, without those whose prompt is held out."""
    held_out: tuple[DictRow, ...]
    num_excluded: int
    """The number of training rows that were left out because their prompt is held out."""


def load_rows(spec: FrozenSpec) -> Rows:
    """Load both splits; held-out prompts are excluded from training by their text.

    Raises:
        ExitError: a source cannot be read, is empty, or has a row from which no prompt can be made.
    """
    held_out: tuple[DictRow, ...] = ()
    if spec.evaluation is not None:
        held_out = _distinct(
            _load_split(spec.dataset, spec.evaluation), spec.dataset.prompt_field, spec.evaluation
        )
    excluded = {prompt_text(row, spec.dataset.prompt_field) for row in held_out}
    rows = _load_split(spec.dataset, None)
    training = tuple(row for row in rows if prompt_text(row, spec.dataset.prompt_field) not in excluded)
    if not training:
        raise ExitError(
            ExitCode.UNUSABLE,
            f"spec.dataset.source: {spec.dataset.source}: all {len(rows)} rows are held out for evaluation; "
            "evaluate on another split, or on fewer samples",
        )
    return Rows(training, held_out, len(rows) - len(training))


class PromptOrder:
    """Decides which row a ticket gets, by a new seeded permutation in every pass over the data."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self._num_rows = num_rows
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def index(self, ticket: int) -> int:
        """Return the row of a ticket (tickets count from 1); the answer for a ticket is always the same."""
        epoch, place = divmod(ticket - 1, self._num_rows)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self._num_rows)
        return int(self._permutation[place])


def count_shared(prompts: Iterable[str], held_out: Sequence[DictRow], prompt_field: str) -> int:
    """Return how many held-out prompts are among `prompts`."""
    known = set(prompts)
    return sum(prompt_text(row, prompt_field) in known for row in held_out)


def _load_split(dataset: DatasetSpec, evaluation: FrozenEvaluationSpec | None) -> list[DictRow]:
    """Load one split and check every row.

    Args:
        evaluation: names the held-out split to load; None to load the training split.
    """
    block = "spec.dataset" if evaluation is None else "spec.evaluation"
    chosen = dataset if evaluation is None else evaluation
    where = f"{block}.source: {chosen.source}"
    scheme, separator, rest = chosen.source.partition("://")
    name = rest if separator else chosen.source
    load = SOURCES[scheme] if separator else _from_factory
    found = load(Wanted(name, chosen.split, chosen.parameters, dataset.seed, where))
    rows: list[DictRow] = []
    for number, item in enumerate(found, start=1):
        if not isinstance(item, Mapping):
            raise ExitError(
                ExitCode.UNUSABLE, f"{where}: row {number} is {type(item).__name__}; must be a mapping"
            )
        row = dict(item)
        rows.append(row)
        try:
            prompt_text(row, dataset.prompt_field)
            msgspec.msgpack.decode(
                msgspec.msgpack.encode(row), type=DictRow
            )  # the form in which it reaches a worker
        except (PromptError, TypeError, ValueError, OverflowError) as error:
            raise ExitError(
                ExitCode.UNUSABLE,
                f"{where}: row {number}: {error}; set spec.dataset.promptField, or fix the row",
            ) from error
    if not rows:
        raise ExitError(ExitCode.UNUSABLE, f"{where}: split {chosen.split!r} has no rows")
    return rows


class Wanted(NamedTuple):
    """A split of a data set, as it is requested from a source."""

    name: str
    """What follows the scheme in `source`."""
    split: str
    parameters: Mapping[str, Any]
    seed: int
    where: str
    """The field and its value, with which every message begins."""


def _from_factory(wanted: Wanted) -> list[Any]:
    field = wanted.where.split(":")[0]
    try:
        factory = load_object(wanted.name, field)
    except ImportFailed as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    try:
        return list(factory(split=wanted.split, seed=wanted.seed, **wanted.parameters))
    except Exception as error:  # user code may raise anything
        log.exception("%s", wanted.where)
        raise ExitError(ExitCode.UNUSABLE, f"{wanted.where}: {type(error).__name__}: {error}") from error


def _from_file(wanted: Wanted) -> list[DictRow]:
    path, where = Path(wanted.name), wanted.where
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)  # splitlines() would split at U+2028, which may occur within a string
    except OSError as error:
        raise ExitError(ExitCode.REFUSED, f"{where}: {error.strerror or error}: {path}") from error
    except UnicodeDecodeError as error:
        raise ExitError(ExitCode.UNUSABLE, f"{where}: is not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ExitError(ExitCode.UNUSABLE, f"{where}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ExitError(
                ExitCode.UNUSABLE, f"{where}: line {number} is {type(row).__name__}; must be an object"
            )
        rows.append(row)
    return rows


def _from_reasoning_gym(wanted: Wanted) -> list[DictRow]:
    import reasoning_gym

    distance = 0 if wanted.split == "train" else REASONING_GYM_SPLIT_DISTANCE
    settings = {"size": REASONING_GYM_ROWS, "seed": wanted.seed + distance, **wanted.parameters}
    # A worker's scorer makes the data set again from what is in the row.
    scored_by = {
        "source_dataset": wanted.name,
        "dataset_parameters": {
            key: value for key, value in wanted.parameters.items() if key not in ("size", "seed")
        },
    }
    try:
        items = reasoning_gym.create_dataset(wanted.name, **settings)
        return [{**item, "metadata": {**item["metadata"], **scored_by}} for item in items]
    except Exception as error:  # each task checks its parameters in its own way
        raise ExitError(
            ExitCode.REFUSED,
            f"{wanted.where}: {type(error).__name__}: {error}; parameters are {dict(wanted.parameters)}",
        ) from error


def _from_hub(wanted: Wanted) -> list[DictRow]:
    try:
        import datasets
    except ImportError as error:
        raise ExitError(
            ExitCode.REFUSED, f"{wanted.where}: needs the package datasets: pip install 'asyncrl[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(wanted.name, split=wanted.split, **wanted.parameters)
        return [dict(row) for row in rows]
    except Exception as error:  # the library raises its own, the hub client's, and plain ones
        raise ExitError(
            ExitCode.TRY_AGAIN, f"{wanted.where}: split {wanted.split!r}: {type(error).__name__}: {error}"
        ) from error


SOURCES: Mapping[str, Callable[[Wanted], Iterable[Any]]] = {
    "file": _from_file,
    "hf": _from_hub,
    "reasoning-gym": _from_reasoning_gym,
}
"""The sources by the scheme of `source`; a `source` without a scheme names a factory."""


def _distinct(
    rows: Sequence[DictRow], prompt_field: str, evaluation: FrozenEvaluationSpec
) -> tuple[DictRow, ...]:
    """Return the first `samples` rows with different prompts."""
    by_prompt: dict[str, DictRow] = {}
    for row in rows:
        by_prompt.setdefault(prompt_text(row, prompt_field), row)
    if len(by_prompt) < evaluation.samples:
        log.warning(
            "spec.evaluation.samples: %d: %s has only %d different prompts",
            evaluation.samples,
            evaluation.source,
            len(by_prompt),
        )
    return tuple(by_prompt.values())[: evaluation.samples]
