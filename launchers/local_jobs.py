"""Jobs of ``--cluster local``: find and cancel the submitit process that started their ranks on this machine."""

from __future__ import annotations

import contextlib

import psutil

from cit_scale.run.folders import Job

# A process starts before job.json notes its id. The two times come from two clocks, hence the margin.
CLOCK_MARGIN_S = 60


def find_controller(job: Job) -> psutil.Process | None:
    """The submitit process that watches a local job's ranks; None once it has ended."""
    try:
        process = psutil.Process(int(job.job_id))
        if process.create_time() > job.submitted + CLOCK_MARGIN_S:
            return None  # Linux has given the id to another process since
        # A job with --setup lines is started by a shell: submitit is the shell's child.
        family = [process, *process.children()]
        return next((each for each in family if "submitit.local._local" in each.cmdline()), None)
    except (psutil.Error, ValueError):
        return None


def cancel_local_job(job: Job, *, now: bool) -> None:
    """End a local job's ranks for good. now: kill them without time to save."""
    controller = find_controller(job)
    with contextlib.suppress(psutil.NoSuchProcess):
        if controller and not now:
            controller.terminate()  # submitit passes SIGTERM on to the ranks and ends when they have saved
        elif controller:
            ranks = controller.children(recursive=True)
            controller.kill()  # before the ranks, so that it does not act on their end
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
