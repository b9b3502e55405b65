"""``cit-scale runs list --html``: one page that lists all runs, each with a link to its report."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cit_scale.inference.outputs import check_output, write_output
from cit_scale.report.html import PAGE_SUFFIXES, render_page
from cit_scale.run.folders import RunFolder, find_runs
from cit_scale.run.show import State, StatesOf, as_date, cells_of, summarize
from cit_scale.run_folder import REPORT

INDEX = "index.html"  # in the folder of all runs


def write_index(runs_dir: Path, states_of: StatesOf, out: str, *, set_aside: bool) -> Path:
    """Write the page. Returns its file.

    out: the file; empty: ``INDEX`` in ``runs_dir``. set_aside: include runs that --fresh has renamed. Raises
    MissingInputError if ``runs_dir`` is not a folder, what ``check_output`` raises, and OSError.
    """
    runs = find_runs(runs_dir, set_aside=set_aside)
    reports = [str(run.folder / REPORT) for run in runs]
    file = check_output("--html", out or str(runs_dir / INDEX), reports, suffixes=PAGE_SUFFIXES)
    rows = [_row(run, state, file.parent) for run, state in zip(runs, states_of(runs), strict=True)]
    write_output(file, render_page("index.html", rows=rows, runs_dir=runs_dir.resolve(), made=as_date(time.time())))
    return file


def _row(run: RunFolder, state: State, folder: Path) -> dict[str, Any]:
    """folder: in which the page lies. The link is empty where the run has no report."""
    cells = cells_of(summarize(run, state))
    report, link = run.folder / REPORT, ""
    if report.is_file():
        # From a "./" on and quoted: a name with a colon would be read as an address of another kind.
        link = "./" + quote(os.fsencode(os.path.relpath(os.path.realpath(report), os.path.realpath(folder))))
    return {**cells, "link": link, "started": as_date(run.starts[0]["time"]) if run.starts else ""}
