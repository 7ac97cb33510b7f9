"""Imports user code, which a manifest names as `pkg.module:name`."""

import importlib
from typing import Any


class ImportFailed(ValueError):
    """A reference names nothing that can be imported; the message says what and why."""


def load_object(reference: str, field: str) -> Any:
    """Import what `reference` names.

    Args:
        field: field of the manifest that holds the reference, for the message.

    Raises:
        ImportFailed: the reference has no colon, the module cannot be imported, or lacks the name.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise ImportFailed(f"{field}: {reference!r}: must have the form pkg.module:name")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # user code runs at import and may raise anything
        raise ImportFailed(
            f"{field}: {reference!r}: module {module_name} cannot be imported: "
            f"{type(error).__name__}: {error}; is its folder on the import path?"
        ) from error
    for part in name.split("."):
        if not hasattr(target, part):
            raise ImportFailed(f"{field}: {reference!r}: {module_name} has no {name}")
        target = getattr(target, part)
    return target
