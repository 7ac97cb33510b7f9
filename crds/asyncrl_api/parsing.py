"""Turns a YAML file into an AsyncRLJob, or into a list of everything that is wrong with it.

What the API server would refuse is refused here too, by the same types and the same rules.
"""

import copy
import difflib
import functools
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from asyncrl_api.base import PATTERN_WORDS
from asyncrl_api.free_forms import free_form_violations
from asyncrl_api.job import API_VERSION, KIND, AsyncRLJob, Spec, to_manifest
from asyncrl_api.marks import block_of, marks
from asyncrl_api.rules import violations


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong with a manifest."""

    path: str
    """The path in the manifest: `spec.training.batchSize`, `spec.scheduling.tolerations[0]`."""
    rule: str
    """What must hold, in words."""
    value: Any = None
    """The value that was found, if it helps and the rule does not name it."""

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.path, _shown(self.value), self.rule]))


class SpecError(Exception):
    """A manifest cannot be used as it is. The user must be told; trying again does not help."""

    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(map(str, self.errors)))


def load_documents(path: Path) -> list[Any]:
    """Return the documents of a YAML 1.2 (or JSON) file, without the empty ones.

    Raises:
        SpecError: the file is not YAML, has a key twice, or holds no document; says where.
    """
    try:
        documents = [each for each in _yaml().load_all(path.read_text(encoding="utf-8")) if each is not None]
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError([_syntax_error(str(path), error)]) from error
    if not documents:
        raise SpecError([FieldError(str(path), "holds no document")])
    return documents


def validate(document: Any) -> list[FieldError]:
    """Return everything that is wrong with a manifest; rules across fields are checked once each is right."""
    return _check(document)[1]


def parse_job(document: Any) -> AsyncRLJob:
    """Return the job that a manifest describes.

    Raises:
        SpecError: something is wrong with the manifest; holds everything that is.
    """
    job, errors = _check(document)
    if job is None or errors:
        raise SpecError(errors)
    return job


def parse_spec(spec: Any) -> Spec:
    """Return the spec of a job whose name does not matter.

    Raises:
        SpecError: as for `parse_job`.
    """
    return parse_job(
        {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "job"}, "spec": spec}
    ).spec


def apply_overrides(document: Any, overrides: Iterable[str]) -> Any:
    """Return a copy of `document` in which fields are replaced (`--set`).

    Args:
        document: a manifest; maps that it lacks are added.
        overrides: for example `spec.training.maxSteps=5`; the value is YAML, so `{a: 1}` and `[1, 2]` can be
            set too. A key with dots (a node label) can only be set as part of its map.

    Raises:
        SpecError: an override cannot be understood, or its path goes through something that is not a map.
    """
    changed = copy.deepcopy(document)
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise SpecError([FieldError("--set", "must have the form path.to.field=value", override)])
        _set(changed, names, _parse_value(path, text))
    return changed


def _set(manifest: Any, names: list[str], value: Any) -> None:
    below = manifest
    for depth, name in enumerate(names):
        if not isinstance(below, dict):
            path = ".".join(names[:depth]) or "the manifest"
            raise SpecError(
                [FieldError(".".join(names), f"cannot be set: {path} is {_kind(below)}, not a map")]
            )
        if depth == len(names) - 1:
            below[name] = value
        else:
            below = below.setdefault(name, {})


def _parse_value(path: str, text: str) -> Any:
    if not text.strip():
        return ""
    try:
        return _yaml().load(text)
    except (YAMLError, RecursionError) as error:
        raise SpecError([_syntax_error(f"--set {path}", error)]) from error


class _Constructor(SafeConstructor):
    """Reads dates as text, as JSON does."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def render_yaml(document: Any) -> str:
    """Return a document as YAML 1.2, with its keys in their order."""
    yaml: Any = YAML(typ="safe", pure=True)  # its attributes are declared as None
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 110
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)  # the C parser knows YAML 1.1 only, where 1e-6 is a string
    yaml.Constructor = _Constructor
    return yaml


def _syntax_error(place: str, error: YAMLError | UnicodeDecodeError | RecursionError) -> FieldError:
    if isinstance(error, RecursionError):
        return FieldError(place, "is nested too deeply")
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return FieldError(f"{place}:{error.problem_mark.line + 1}", str(error.problem))
    return FieldError(place, f"not YAML: {error}".splitlines()[0])


def _check(document: Any) -> tuple[AsyncRLJob | None, list[FieldError]]:
    """Return the job, or None if a field is wrong, and everything that is wrong."""
    if errors := _wrong_kind(document):
        return None, errors
    try:
        errors = list(_not_json(document.get("spec", {}), "spec"))
    except RecursionError:
        return None, [FieldError("spec", "is nested too deeply, or an alias stands within its own anchor")]
    try:
        job = AsyncRLJob.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        known = {each.path for each in errors}
        errors += [each for each in map(_translate, error.errors()) if each.path not in known]
        return None, errors
    if errors:
        return None, errors
    broken = [*violations(to_manifest(job)), *free_form_violations(job.spec)]
    return job, [FieldError(path, message) for path, message in broken]


def _wrong_kind(document: Any) -> list[FieldError]:
    """Return why this is not an AsyncRLJob at all; whatever else is wrong does not matter then."""
    if not isinstance(document, dict):
        what = "is empty" if document is None else f"is {_kind(document)}"
        return [FieldError("manifest", f"{what}, but must be a map with apiVersion, kind, metadata and spec")]
    return [
        FieldError(name, f"must be {expected}", document.get(name))
        for name, expected in (("apiVersion", API_VERSION), ("kind", KIND))
        if document.get(name) != expected
    ]


def _not_json(value: Any, path: str) -> Iterator[FieldError]:
    """Yield values that YAML allows and the API server would refuse or misread, in free-form fields too."""
    if value is None:
        yield FieldError(path, "null is not allowed: write a value, or leave the field out")
    elif isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                yield FieldError(f"{path}.{key}", "names must be strings: put it in quotes")
            yield from _not_json(below, f"{path}.{key}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _not_json(below, f"{path}[{index}]")
    elif not isinstance(value, str | int | float):
        yield FieldError(path, f"{_kind(value)} cannot be written as JSON")
    elif isinstance(value, float) and not math.isfinite(value):
        yield FieldError(path, "must be a finite number", value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield FieldError(path, "must be an integer of 64 bits", value)


_WORDS = {
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "model_type": "must be a map",
    "dict_type": "must be a map",
    "list_type": "must be a list",
    "invalid_key": "names must be strings: put it in quotes",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than_equal": "must be less than or equal to {le}",
    "literal_error": "must be {expected}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_long": "must have at most {max_length} entries, has {actual_length}",
}
"""pydantic's error types in our words."""


def _translate(error: ErrorDetails) -> FieldError:
    """Return what pydantic found, in the user's words."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    path = _path(error)
    if kind == "missing":
        return FieldError(path, "is required")
    if kind == "extra_forbidden":
        return FieldError(path, f"is not a known field{_did_you_mean(error['loc'])}")
    if kind == "string_pattern_mismatch":
        return FieldError(path, PATTERN_WORDS[context["pattern"]], value)
    rule = _WORDS[kind].format(**context) if kind in _WORDS else error["msg"]
    if kind in {"int_type", "float_type"} and isinstance(value, str) and _is_number(value):
        rule += ", without quotes"
    elif kind == "string_type" and not isinstance(value, dict | list):
        rule += ": put it in quotes"
    elif isinstance(value, dict | list):
        return FieldError(path, rule if kind == "too_long" else f"{rule}, not {_kind(value)}")
    return FieldError(path, rule, value)


def _path(error: ErrorDetails) -> str:
    names = [name for name in error["loc"] if name != "[key]"]
    if error["type"] == "invalid_key" or error["loc"][-1] == "[key]":  # a number that is a name, not an index
        names[-1] = str(names[-1])
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    """Return a suggestion for an unknown field: a sibling with a similar name, or the same name elsewhere."""
    *parents, name = location
    block: type[BaseModel] | None = AsyncRLJob
    for parent in parents:
        if isinstance(parent, str) and block:
            block = block_of(_fields(block)[parent])
    similar = difflib.get_close_matches(str(name), _fields(block) if block else ())
    elsewhere = [f"spec.{path}" for path in marks(Spec) if path.rpartition(".")[2] == name]
    suggestions = similar[:1] or elsewhere
    return f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""


@functools.cache
def _fields(block: type[BaseModel]) -> Mapping[str, Any]:
    """Return the fields of `block`: name in the manifest -> annotation."""
    return {info.alias or name: info.annotation for name, info in block.model_fields.items()}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _kind(value: Any) -> str:
    match value:
        case None:
            return "empty"
        case dict():
            return "a map"
        case list():
            return "a list"
        case str():
            return "text"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
    return f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    """Return a value as it looks in YAML, shortened if it is long; an empty text for None."""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case str():
            text = f'"{value}"'
        case _:
            text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
