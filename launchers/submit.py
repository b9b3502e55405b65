"""Queue a training run with Slurm, after checking here, in front of the user, everything that could fail later."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python searches this file's folder for imports; the package lies one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import launchers.environment  # first: it records the environment before other imports add to it  # noqa: F401
from cit_scale import cli, text
from cit_scale.config import RunConfig, check_config, split_batch
from cit_scale.errors import BadImageError, ConfigError, RefusedError, RunError, error_line, exit_code_of
from cit_scale.files import read_notes, write_text
from cit_scale.run.folders import RunFolder
from cit_scale.run_folder import SUBMISSIONS
from launchers.options import Options, option_argv, parse
from launchers.resources import RunRequest, allot, find_partitions
from launchers.slurm import ask_start
from launchers.state import state_now
from launchers.sweep import sweep

if TYPE_CHECKING:
    import submitit


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, plan, submit. Returns an exit code of ``cit_scale.errors``."""
    try:
        given, train_argv = parse(sys.argv[1:] if argv is None else argv)
        return submit(Options(**given), given, train_argv)
    except (RunError, BadImageError, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
        return exit_code_of(error)


def submit(options: Options, given: Mapping[str, Any], train_argv: Sequence[str]) -> int:
    """Check, plan and submit the runs. given: options set by the user; repeated when a run is resubmitted."""
    arguments = cli.parse_arguments(train_argv)
    if options.doctor:
        from launchers.examine import examine_nodes

        return examine_nodes(options, Path(arguments.config.runs_dir).expanduser())
    runs = plan_runs(arguments, train_argv, options.sweep)
    partitions = find_partitions(options)
    resources = allot(options, partitions, runs)
    for run in runs:
        split_batch(run.config, resources.nodes * resources.ranks_per_node)
    same_run = not arguments.fresh and not arguments.override_resume

    # Imported here because they take seconds: help and mistakes in the arguments are answered before.
    from launchers.checks import check_runs, submission_lines
    from launchers.executors import batch_script, check_log_folder, slurm_executor, submit_local, submit_slurm

    world, on_gpus = resources.world_on(resources.nodes), resources.gpus_per_node > 0
    prepared = check_runs(runs, world, same_run=same_run, on_gpus=on_gpus)
    folder = submission_folder(arguments.config, is_sweep=len(runs) > 1)
    if options.cluster == "slurm":
        check_log_folder(folder)
    if options.dependency is None:  # a job that waits for the other job may use the same folder
        for run in runs:
            refuse_running(run)
    for line in submission_lines(options, resources, partitions, prepared, runs):
        print(line, flush=True)
    executor = slurm_executor(options, resources, runs, folder) if options.cluster == "slurm" else None
    if options.dry_run:
        if executor is not None:
            show_script(batch_script(executor, len(runs)), can_ask=partitions is not None)
        return 0
    kept = {run.config.run_dir: set_aside(run.config.run_dir) for run in runs if arguments.fresh}
    match options.cluster:
        case "debug":
            from cit_scale.train import main as train

            return train(runs[0].argv)
        case "local":
            jobs = [submit_local(options, resources, runs[0], folder)]
        case _:
            assert executor is not None  # the cluster is slurm
            try:
                jobs = submit_slurm(executor, runs)
            except ConfigError:
                for run_dir, aside in kept.items():
                    put_back(run_dir, aside)
                raise
    for run, job in zip(runs, jobs, strict=True):
        note_submission(run, job, options.cluster, given)
        print(f"submitted as job {job.job_id}: {run.config.run_dir}", flush=True)
    logs = " ".join(shlex.quote(str(job.paths.stdout)) for job in jobs)
    print(f"follow with: tail --retry -F {logs}", flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def plan_runs(arguments: cli.Arguments, train_argv: Sequence[str], axes: Sequence[str]) -> list[RunRequest]:
    """The runs of the command line: one, or the runs of the sweep. Raises ConfigError.

    arguments: ``train_argv``, parsed.
    """
    # --fresh sets the run folder aside once, on submission. In the job it would do so again at every requeue.
    argv = [argument for argument in train_argv if argument != "--fresh"]
    runs = []
    for more in sweep(arguments.config, axes) if axes else [[]]:
        parsed = cli.parse_arguments([*argv, *more]) if axes else arguments
        parsed = parsed if arguments.fresh else parsed.as_begun()
        runs.append(RunRequest((*argv, *more), parsed.config, parsed.teacher_run_configs))
    for run in runs:
        check_config(run.config)
    return runs


def refuse_running(run: RunRequest) -> None:
    """Raise RefusedError if a job of the same run waits or trains."""
    run_dir = run.config.run_dir
    state = state_now(RunFolder(run.config.name, run_dir))
    if state.is_active:
        raise RefusedError(
            f"{run_dir} is {state} already; cancel that first (python launchers/runs.py cancel), "
            "have this one wait for it with --dependency, or give it another --name"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Printed


def show_script(script: str, *, can_ask: bool) -> None:
    """Print a batch script, and what sbatch says of it. can_ask: whether this machine has a Slurm."""
    if can_ask:
        from cit_scale.run.plan import row

        print(row("sbatch says", ask_start(script)), flush=True)
    print(f"\n{script}", end="", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def set_aside(run_dir: Path) -> Path | None:
    """Rename the run folder to NAME.1 or so. Returns the new path; None where there was no folder.

    Raises RefusedError if another job works in the folder.
    """
    from cit_scale.distributed.lock import exclusive
    from cit_scale.distributed.stop import StopRequest
    from cit_scale.distributed.world import World
    from cit_scale.run.setup import set_aside as set_run_aside

    with StopRequest() as stop, exclusive(run_dir, World(), stop, wait_s=0):
        return set_run_aside(run_dir, World())


def put_back(run_dir: Path, aside: Path | None) -> None:
    """Undo ``set_aside`` where sbatch has refused: in the new folder lie submitit's files of that, no more."""
    if aside is not None:
        shutil.rmtree(run_dir / "slurm", ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            run_dir.rmdir()
        print(f"{run_dir} is back, as nothing was queued", flush=True)
        aside.rename(run_dir)


def submission_folder(config: RunConfig, *, is_sweep: bool) -> Path:
    """The folder of submitit's files: batch scripts, pickles, logs. A sweep's lies beside its run folders."""
    run_dir = config.run_dir.absolute()
    return (run_dir.with_name(f"{run_dir.name}-sweep") if is_sweep else run_dir) / "slurm"


def note_submission(run: RunRequest, job: submitit.Job, cluster: str, given: Mapping[str, Any]) -> None:
    """Add the job to job.json in the run folder."""
    path = run.config.run_dir / SUBMISSIONS
    about = {
        "job_id": job.job_id,
        "cluster": cluster,
        "submitted": time.time(),
        "log": str(job.paths.stdout),
        "command": [*option_argv(given), *run.argv],
        "cwd": os.getcwd(),
    }
    earlier = read_notes(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*earlier, about], indent=2) + "\n")


if __name__ == "__main__":
    # What a dry run prints is its result. A submission goes on without its output: the log may be on a full disk.
    text.outlive_readers(and_full_disks="--dry-run" not in sys.argv)
    raise SystemExit(main())
