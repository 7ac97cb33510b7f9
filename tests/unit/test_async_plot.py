"""README's plot shows what tests/bench/async.jsonl says."""

import json

from bench.plot_async import PLOT, RESULTS, draw, shares


def test_the_plot_is_drawn_from_the_results() -> None:
    assert PLOT.read_text() == draw(shares(RESULTS.read_text())), "run tests/bench/plot_async.py"


def test_a_bar_is_as_high_as_the_mean_over_the_seeds() -> None:
    lines = [
        {"row": "bound", "profile": "areal-7b", "eta": 4, "figures": {"share_of_bound": share}}
        for share in (0.5, 0.7)
    ]
    found = shares("\n".join(map(json.dumps, lines)))
    assert found == {("areal-7b", 4): 0.6}
    assert ">60</text>" in draw(found)
