"""What a run has noted of its inputs: in its results, or else in its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from cit_scale.data.versions import LATEST, StreamVersions, read_versions
from cit_scale.run_folder import STREAM, newest_note


def noted_inputs(run_dir: Path) -> tuple[dict[str, str], bool]:
    """Read the fingerprints in a run folder, and whether they come from results. Empty where there are none, and for a
    file that is damaged or of an earlier version: loading it reports damage.
    """
    content, is_finished = newest_note(run_dir)
    return content.get("inputs", {}), is_finished


def noted_versions(run_dir: Path) -> StreamVersions:
    """The versions of the stream that a run goes on with: the latest where it has not begun. Raises RefusedError."""
    content, _ = newest_note(run_dir)
    return read_versions(content.get(STREAM, {}), run_dir) if content else LATEST
