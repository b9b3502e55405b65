"""What a run has noted of its inputs: in its results, or else in its newest checkpoint."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from cit_scale.checkpoint.store import META
from cit_scale.data.versions import LATEST, StreamVersions, read_versions
from cit_scale.run_folder import CHECKPOINTS, RESULTS, saved_steps, step_path

STREAM = "stream"
"""Key of the stream's versions, beside the inputs."""


def noted_inputs(run_dir: Path) -> tuple[dict[str, str], bool]:
    """Read the fingerprints in a run folder, and whether they come from results. Empty where there are none, and for a
    file that is damaged or of an earlier version: loading it reports damage.
    """
    content, is_finished = _newest_note(run_dir)
    return content.get("inputs", {}), is_finished


def noted_versions(run_dir: Path) -> StreamVersions:
    """The versions of the stream that a run goes on with: the latest where it has not begun. Raises RefusedError."""
    content, _ = _newest_note(run_dir)
    return read_versions(content.get(STREAM, {}), run_dir) if content else LATEST


def _newest_note(run_dir: Path) -> tuple[dict[str, Any], bool]:
    """The newest note that can be read, and whether it is that of results; an empty one if there is none."""
    steps = saved_steps(run_dir / CHECKPOINTS)
    notes = [
        run_dir / RESULTS,
        *(step_path(run_dir / CHECKPOINTS, step) / META for step in sorted(steps, reverse=True)),
    ]
    for note in notes:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(note.read_text())
            if isinstance(content, dict) and isinstance(content.get("inputs"), dict):
                return content, note.name == RESULTS
    return {}, False
