"""What a local run makes of its trainer's report, whatever is in the file."""

import io
from pathlib import Path

from rich.console import Console

from asyncrl_operator.local.local_run import LocalPlaces, LocalRun
from asyncrl_operator.local.progress import Display, render_line
from asyncrl_operator.local.run_folder import RunFolder
from support.messages.samples import make_job


def test_a_report_that_cannot_be_read_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    screen, folder = io.StringIO(), RunFolder(tmp_path)
    display = Display(Console(file=screen, force_terminal=False, width=200, color_system=None))
    run = LocalRun(make_job(), folder, LocalPlaces("c", None, {}), tmp_path, display)
    for text in ("{}", "{}", "[" * 3000, "[" * 3000):
        folder.report.write_text(text)
        assert run._report() is None
    folder.report.write_text('{"attempt":1,"step":-7,"maxSteps":9,"state":"Training","waitShare":"Infinity"}')
    report = run._report()
    assert report is not None and render_line(report).startswith("step 0/9  Training  waited 100%")
    said = screen.getvalue().splitlines()
    assert len(said) == 3 and all(str(folder.report) in line for line in said)
    assert said[2].endswith("step, wait_share: out of bounds, and cut or left out")
