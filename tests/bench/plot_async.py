"""Draws docs/async.svg, the plot in README of throughput by staleness, from async.jsonl.

It needs the standard library only.

    python tests/bench/plot_async.py
"""

import json
from html import escape
from pathlib import Path
from statistics import mean

RESULTS = Path(__file__).with_name("async.jsonl")
PLOT = Path(__file__).parents[2] / "docs" / "async.svg"
PROFILES = {"areal-1.5b": "1.5B", "areal-7b": "7B", "areal-14b": "14B", "areal-32b": "32B"}
COLORS = {0: "#b9c0c9", 1: "#8db4dc", 2: "#4c86c6", 4: "#1d4f91"}
"""By eta."""
WIDTH, HEIGHT, LEFT, TOP, FLOOR = 760, 340, 52, 58, 286
BAR, GAP = 34, 4


def main() -> None:
    PLOT.write_text(draw(shares(RESULTS.read_text())))


def shares(text: str) -> dict[tuple[str, int], float]:
    """Return the share of the bound by profile and eta, the mean over the seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for line in map(json.loads, text.splitlines()):
        if line["row"] == "bound":
            key = line["profile"], line["eta"]
            found.setdefault(key, []).append(line["figures"]["share_of_bound"])
    return {key: mean(values) for key, values in found.items()}


def draw(found: dict[tuple[str, int], float]) -> str:
    """Return the plot as SVG: a group of bars for each profile."""
    profiles = [profile for profile in PROFILES if any(key[0] == profile for key in found)]
    parts = [
        text(LEFT, 22, "Throughput over min(generation, training) capacity, by staleness.maxVersions", 15)
    ]
    for place, eta in enumerate(COLORS):
        x = LEFT + 110 * place
        label = "0 (synchronous)" if eta == 0 else str(eta)
        x += 45 if place else 0
        parts += [rectangle(x, 34, 12, 12, COLORS[eta]), text(x + 18, 45, label)]
    for tenth in (0, 25, 50, 75, 100):
        y = height_of(tenth / 100)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d5d9de"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tenth} %", anchor="end"))
    step = (WIDTH - LEFT - 10) / max(1, len(profiles))
    for place, profile in enumerate(profiles):
        middle = LEFT + step * (place + 0.5)
        parts += bars(profile, middle, found)
        parts.append(text(middle, FLOOR + 20, PROFILES[profile], 14, "middle"))
    parts.append(
        text(LEFT, HEIGHT - 12, "Real runtime in virtual time. Devices are emulated: no GPU has run this.")
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, rectangle(0, 0, WIDTH, HEIGHT, "#ffffff"), *parts, "</svg>", ""])


def bars(profile: str, middle: float, found: dict[tuple[str, int], float]) -> list[str]:
    """Return the bars of a profile, with their values."""
    left, parts = middle - (len(COLORS) * (BAR + GAP) - GAP) / 2, []
    for place, (eta, color) in enumerate(COLORS.items()):
        if (share := found.get((profile, eta))) is None:
            continue
        x, y = left + place * (BAR + GAP), height_of(share)
        parts += [
            rectangle(x, y, BAR, FLOOR - y, color),
            text(x + BAR / 2, y - 4, f"{100 * share:.0f}", 11, "middle"),
        ]
    return parts


def height_of(share: float) -> float:
    return FLOOR - share * (FLOOR - TOP - 14)


def rectangle(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="#22272e">{escape(words)}</text>'


if __name__ == "__main__":
    main()
