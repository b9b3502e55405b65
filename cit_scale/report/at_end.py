"""The report at the end of a run. Imports neither the page nor its libraries before there is a page to make."""

from __future__ import annotations

import os
import shlex

from cit_scale.config import RunConfig
from cit_scale.distributed.overseer import SECONDS
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.watchdog import Watchdog
from cit_scale.distributed.world import World, broadcast, run_on_all_ranks
from cit_scale.errors import error_line
from cit_scale.run_folder import REPORT, is_current_report


def leave_report(config: RunConfig, world: World, stop: StopRequest) -> None:
    """Collective. Write the page about a finished run, unless it has one of its results, or the run is asked to stop.

    An error is printed and does not fail the run, whose results are there. Only a report that hangs for longer than
    train.step_timeout_s ends the process, as any hang does; the run is finished all the same.
    """
    run_dir = config.run_dir
    if broadcast(world, is_current_report(run_dir)):
        return
    later = f"cit-scale report {shlex.quote(str(run_dir))}"
    try:
        said = _make(config, world, stop, later)
    except Exception as error:  # of a library that cannot be imported, of whatever is drawn
        said = [f"no report was written: {error_line(error)}; {later} tries again"]
    if world.is_main:
        for line in said:
            print(f"{config.name}  report: {line}", flush=True)


def _make(config: RunConfig, world: World, stop: StopRequest, later: str) -> list[str]:
    """Returns what is to be printed."""
    message = f"the report hangs: nothing came for {SECONDS} seconds; the run itself is finished; {later} tries again"
    # On rank 0, which hears of every batch; when it ends, its launcher ends the others.
    timeout_s = config.train.step_timeout_s if world.is_main else 0.0
    watchdog = run_on_all_ranks(world, lambda: Watchdog(timeout_s, None, message))

    def should_continue() -> bool:
        watchdog.progress()
        return not stop.requested

    with watchdog:
        run_on_all_ranks(world, _import)
        from cit_scale.report.write import make_report

        threads = max(1, len(os.sched_getaffinity(0)) // world.local_world_size)
        notes = make_report(
            config.run_dir,
            config.run_dir / REPORT,
            world,
            config=config,
            threads=threads,
            should_continue=should_continue,
        )
    return [f"none was written, as the run was asked to stop; {later} makes it"] if notes is None else notes


def _import() -> None:
    """Raises what the import of the page's libraries raises, on one rank and so on all."""
    import cit_scale.report.write  # noqa: F401
