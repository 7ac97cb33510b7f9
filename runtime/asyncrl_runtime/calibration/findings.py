"""The numbers of a device model as they are found, with their sources, and why others are not. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from asyncrl_api.parsing import render_yaml
from asyncrl_runtime.emulation.device import NUMBERS, DeviceModel, parse_device_model


class CalibrationError(ValueError):
    """A device model cannot be made; the message says of each number what it lacks."""


@dataclass
class Findings:
    """Numbers of a device model by their paths (`engine.kvTokens`)."""

    numbers: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a number could not be derived."""

    def found(self, path: str, value: float, source: str) -> None:
        """Take a number, rounded to what was measured of it."""
        self.numbers[path] = float(f"{value:.6g}")
        self.sources[path] = source

    def lacks(self, path: str, reason: str) -> None:
        """Note why a number was not found."""
        self.reasons[path] = reason

    def lacks_all(self, block: str, reason: str) -> None:
        """Note why no number of a block was found."""
        self.reasons |= {path: reason for path in NUMBERS if path.startswith(f"{block}.")}

    def joined(self, other: "Findings") -> "Findings":
        """Return both; where both have a number, this one's."""
        return Findings(
            {**other.numbers, **self.numbers},
            {**other.sources, **self.sources},
            {**other.reasons, **self.reasons},
        )


WHOLE = {
    *("engine.gpus", "engine.kvTokens", "engine.maxRunning", "weights.numBytes"),
    *("responses.longestTokens", "responses.shortestTokens", "responses.promptTokens"),
}
"""The numbers that are whole."""


def render_model(findings: Findings, description: str, base: tuple[str, DeviceModel] | None) -> str:
    """Return the YAML of a device model.

    Args:
        base: name and device model from which every number is taken that was not found.

    Raises:
        CalibrationError: a number is neither found nor in the base.
    """
    blocks: dict[str, dict[str, float]] = {}
    sources, missing = {}, []
    kept = {} if base is None else msgspec.to_builtins(base[1])
    for path in NUMBERS:
        block, name = path.split(".")
        if path in findings.numbers:
            value, source = findings.numbers[path], findings.sources[path]
        elif base is not None:
            value = kept[block][name]
            source = f"not measured; of device model {base[0]}: {base[1].sources[path]}"
        else:
            missing.append(f"{path}: {findings.reasons.get(path, 'nothing says it')}")
            continue
        blocks.setdefault(block, {})[name] = round(value) if path in WHOLE else value
        sources[path] = source
    if missing:
        raise CalibrationError(
            "these numbers cannot be derived; name a device model to take them from with --base:\n  "
            + "\n  ".join(missing)
        )
    document: Mapping[str, Any] = {"description": description, **blocks, "sources": sources}
    text = render_yaml(document)
    parse_device_model(text, "as measured")
    return text
