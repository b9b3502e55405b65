"""What submitit runs on each rank for launchers/submit.py: train.py with its arguments. The pickle holds only them."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from cit_scale.distributed.stop import StopRequest
from cit_scale.errors import Stopped
from cit_scale.text import outlive_readers

# By which a rank of submitit's local executor asks to be started again; there it is a constant of a private module.
LOCAL_REQUEUE = 144


@dataclass(frozen=True)
class TrainJob:
    """argv: arguments of train.py."""

    argv: tuple[str, ...]

    def __call__(self) -> int:
        """Train. Returns 0, or leaves the process with the exit code."""
        outlive_readers()
        # Before the slow import: until the signal is ours, submitit's answer to it is to requeue the job at once, from
        # rank 0, before all ranks could save together.
        with StopRequest() as stop:
            from cit_scale.train import main  # here, so that a login node needs no GPU stack to submit

            code = main(self.argv, stop)
        if code:
            raise SystemExit(exit_code(code, stop.signum, os.environ))
        return code


def exit_code(code: int, signum: int | None, env: Mapping[str, str]) -> int:
    """What submitit has to see: its local executor starts a job that ran into its time limit again, if told so.

    Under Slurm slurm/env.sh decides by the code as it is.
    """
    is_time_limit = code == Stopped.exit_code and signum == signal.SIGUSR2
    return LOCAL_REQUEUE if is_time_limit and env.get("SUBMITIT_EXECUTOR") == "local" else code
