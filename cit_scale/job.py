"""The jobs that launchers/submit.py gives to submitit: train.py with its arguments, on each rank, or the doctor.

submitit pickles the job; the pickle holds only the arguments.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cit_scale.distributed.stop import StopRequest
from cit_scale.errors import Stopped
from cit_scale.text import outlive_readers

# Exit code with which a rank asks submitit's local executor to start the job again. submitit defines the number in a
# private module, so it is repeated here.
LOCAL_REQUEUE = 144


@dataclass(frozen=True)
class TrainJob:
    """One rank of a job. argv: arguments of train.py."""

    argv: tuple[str, ...]

    def __call__(self) -> int:
        """Train. Returns 0; for any other exit code the process exits with it. It ends after this either way."""
        outlive_readers()
        # Before the slow import of the trainer: until StopRequest replaces submitit's signal handler, a signal makes
        # submitit requeue the job at once, from rank 0, before all ranks can save together.
        with StopRequest(ends_process=True) as stop:
            # Imported here, so that submitting from a login node does not need the GPU libraries.
            from cit_scale.train import main

            code = main(self.argv, stop)
        if code:
            raise SystemExit(exit_code(code, stop.signum, os.environ))
        return code


@dataclass(frozen=True)
class DoctorJob:
    """The doctor on one node. folder: where it writes NODE.json. runs_dir, quick: as of ``cit-scale doctor``."""

    folder: Path
    runs_dir: Path
    quick: bool

    def __call__(self) -> int:
        """Examine this node. Returns 0, also for a node that is unfit: the file says it."""
        outlive_readers()
        from cit_scale.doctor.show import write_record

        write_record(self.folder, self.runs_dir, quick=self.quick)
        return 0


def exit_code(code: int, signum: int | None, env: Mapping[str, str]) -> int:
    """Translate the trainer's exit code for submitit.

    After a time limit (SIGUSR2) submitit's local executor starts the job again only for the code LOCAL_REQUEUE. Under
    Slurm the code stays as it is, because launchers/requeue.py, called by slurm/env.sh, decides by it.
    """
    is_time_limit = code == Stopped.exit_code and signum == signal.SIGUSR2
    return LOCAL_REQUEUE if is_time_limit and env.get("SUBMITIT_EXECUTOR") == "local" else code
