"""Submit jobs with submitit, to Slurm or to this machine, and write the batch script of a dry run."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

from cit_scale.config import REPOSITORY
from cit_scale.errors import ConfigError, one_line
from cit_scale.job import DoctorJob, TrainJob
from launchers.environment import own_environment
from launchers.options import Options
from launchers.resources import Resources, RunRequest

A_YEAR_MIN = 365 * 24 * 60  # submitit's local jobs need a limit

# ---------------------------------------------------------------------------------------------------------------------
# Slurm


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor without its check that srun is here: a dry run needs no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def slurm_executor(options: Options, resources: Resources, runs: Sequence[RunRequest], folder: Path) -> SlurmExecutor:
    """An executor with the parameters of these runs. folder: of its batch scripts, pickles and logs."""
    additional: dict[str, Any] = {"requeue": True}
    if resources.min_nodes < resources.nodes:
        additional["nodes"] = f"{resources.min_nodes}-{resources.nodes}"
        # Given the tasks per node, Slurm allots the fewest nodes although more are free. setup_lines passes the ranks
        # per node to env.sh instead, and Slurm sees one task per node with the cores of all its ranks.
        cores = resources.cores_per_rank and resources.cores_per_rank * resources.ranks_per_node
        tasks = {"cpus_per_task": cores}
    else:
        tasks = {"ntasks_per_node": resources.ranks_per_node, "cpus_per_task": resources.cores_per_rank}
    return _executor(
        options,
        resources,
        folder,
        {
            "job_name": runs[0].config.name if len(runs) == 1 else folder.parent.name,
            **tasks,
            "array_parallelism": options.array or len(runs),
            "additional_parameters": additional,
            "setup": setup_lines(options, resources, runs),
            "srun_args": container_arguments(options.container, needed_folders(runs)),
        },
    )


def check_log_folder(folder: Path) -> None:
    """Raise ConfigError for the path of a log that Slurm would read as another one."""
    if odd := {"%", "\\"} & {*str(folder)}:
        raise ConfigError(
            f"the log would go to {folder}, and Slurm reads {' and '.join(sorted(odd))} there as something else; "
            "choose --runs_dir and --name without"
        )


def doctor_executor(options: Options, resources: Resources, folder: Path) -> SlurmExecutor:
    """An executor for one task on each node, which has all GPUs and cores that the node's ranks would have."""
    cores = resources.cores_per_rank and resources.cores_per_rank * resources.ranks_per_node
    path = shlex.quote(str(REPOSITORY))
    return _executor(
        options,
        resources,
        folder,
        {
            "job_name": "doctor",
            "ntasks_per_node": 1,
            "cpus_per_task": cores,
            "additional_parameters": {"no_requeue": True},
            "setup": [
                *checked_setup(options),
                f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
                # As for the ranks of a run: srun does not take these over from sbatch (launchers/this_job.py).
                "export SLURM_EXPORT_ENV=ALL SLURM_MEM_PER_NODE=0",
                '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
            ],
            "srun_args": container_arguments(options.container, [REPOSITORY, Path.cwd(), folder.parents[1]]),
        },
    )


def _executor(options: Options, resources: Resources, folder: Path, more: Mapping[str, Any]) -> SlurmExecutor:
    """An executor with the options that all jobs share. more: the others of submitit's parameters."""
    executor = SlurmExecutor(folder, python=None if options.container is None else "python3")
    additional = dict(more["additional_parameters"])
    if options.mem is not None:
        additional["mem"] = options.mem  # submitit's mem_gb takes gigabytes only
    parameters: dict[str, Any] = {
        "nodes": resources.nodes,
        "gpus_per_node": resources.gpus_per_node or None,
        # None leaves both to the cluster. submitit's defaults are five minutes and the workload key "submitit".
        "time": resources.minutes,
        "wckey": None,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "dependency": options.dependency,
        "signal_delay_s": options.signal_delay,
        "stderr_to_stdout": True,
        **more,
        "additional_parameters": additional,
    }
    executor.update_parameters(**parameters)
    return executor


def setup_lines(options: Options, resources: Resources, runs: Sequence[RunRequest]) -> list[str]:
    """Lines of shell before the ranks start: --setup, then the variables and arguments that slurm/env.sh reads."""
    checkout = shlex.quote(str(REPOSITORY))
    lines = [
        *checked_setup(options),
        # Not exported: a job that is queued from within this one has its own.
        f"CIT_SCALE={checkout} CIT_PYTHON={shlex.quote(sys.executable)} CIT_MAX_RESTARTS={options.max_restarts}",
    ]
    if len(resources.node_counts) > 1:
        lines.append(f"CIT_RANKS_PER_NODE={resources.ranks_per_node}")
        lines.append(f'CIT_NODE_COUNTS="{" ".join(map(str, resources.node_counts))}"')
    if len(runs) == 1:
        lines.append(f"set -- {shlex.join(runs[0].argv)}".rstrip())
    else:
        cases = [f"  {index}) set -- {shlex.join(run.argv)} ;;" for index, run in enumerate(runs)]
        lines += ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
    return [*lines, f"source {checkout}/slurm/env.sh"]


def checked_setup(options: Options) -> list[str]:
    """The lines of --setup, of which each must succeed."""
    # Without the module that it loads a run would train on something else, or fail later and be tried again.
    # What fails within a file that a line sources is for that file to judge.
    failing = (
        """trap '((${#BASH_SOURCE[@]} > 1)) || { echo "error: --setup fails at: $BASH_COMMAND" >&2; exit 2; }' ERR"""
    )
    return [failing, *options.setup, "trap - ERR"] if options.setup else []


def container_arguments(image: str | None, folders: Sequence[Path]) -> list[str]:
    """Arguments of srun that make pyxis run the ranks in a container. folders: that it mounts."""
    if image is None:
        return []
    mounts = ",".join(f"{path}:{path}" for path in folders)
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


CACHES = {"HF_HOME": "huggingface", "HF_HUB_CACHE": None, "TORCH_HOME": "torch"}
"""Variables that say where pretrained weights lie, and where they lie below XDG_CACHE_HOME without them."""


def needed_folders(runs: Sequence[RunRequest]) -> list[Path]:
    """The folders that a rank reads or writes, from settings and arguments; none lies inside another."""
    paths = {REPOSITORY, Path.cwd()}
    for run in runs:
        config = run.config
        paths |= {Path(config.runs_dir).expanduser(), Path(config.data.cache_dir).expanduser()}
        texts: list[str | None] = [argument.partition("=")[2] or argument for argument in run.argv]
        teachers = config.teachers.values()
        starts = [config.student.start, *(teacher.start for teacher in teachers)]
        models = [config.student.name, *(teacher.model for teacher in teachers)]  # maybe local-dir:FOLDER
        texts += [config.data.train, config.data.eval, config.engine.ds_config]
        texts += [text.removeprefix("local-dir:") for text in (*starts, *models) if text]
        for teacher in teachers:
            texts += [teacher.weights, teacher.classes, teacher.recipe]
        if any(starts) or any(model.startswith("hf-hub:") for model in models):
            caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
            texts += [os.environ.get(name, below and str(caches / below)) for name, below in CACHES.items()]
        files = [Path(text).expanduser() for text in texts if text]
        paths |= {file.parent if file.is_file() else file for file in files if file.exists()}
    folders = {path.absolute() for path in paths}
    return sorted(path for path in folders if not any(parent in folders for parent in path.parents))


def batch_script(executor: SlurmExecutor, jobs: int = 1) -> str:
    """The text of the batch script that sbatch would be given for a job, or for an array of so many."""
    shown = SlurmExecutor(executor.folder, python=executor.python)
    shown.parameters = dict(executor.parameters)
    if jobs > 1:
        shown.parameters["map_count"] = jobs
    return shown._make_submission_file_text(shown._submitit_command_str, uid="")


def submit_slurm(executor: SlurmExecutor, runs: Sequence[RunRequest]) -> list[submitit.Job]:
    """Queue one job, or an array of one job per run. Raises ConfigError if sbatch refuses."""
    return _submit(executor, [TrainJob(run.argv) for run in runs])


def submit_doctor(executor: SlurmExecutor, job: DoctorJob) -> submitit.Job:
    """Queue a job that examines its nodes. Raises ConfigError if sbatch refuses."""
    (queued,) = _submit(executor, [job])
    return queued


def _submit(executor: SlurmExecutor, tasks: Sequence[Callable[[], int]]) -> list[submitit.Job]:
    try:
        # submitit prints sbatch's complaint and raises it as well: it is printed once, by main.
        with own_environment(), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refuses: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# This machine


def submit_local(options: Options, resources: Resources, run: RunRequest, folder: Path) -> submitit.Job:
    """Start the ranks on this machine, in the background; returns at once."""
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        tasks_per_node=resources.ranks_per_node,
        gpus_per_node=int(resources.gpus_per_node),
        visible_gpus=visible_gpus(os.environ),
        timeout_min=resources.minutes or A_YEAR_MIN,
        signal_delay_s=options.signal_delay,
        stderr_to_stdout=True,
        setup=list(options.setup),
    )
    path = ":".join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    here = environment_variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), PYTHONPATH=path)
    with own_environment(), here, silenced():
        return executor.submit(TrainJob(run.argv))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Start background processes with /dev/null as their output, so that a pipe from this process ends with it."""
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def visible_gpus(env: Mapping[str, str]) -> tuple[int, ...]:
    """Numbers of the GPUs in CUDA_VISIBLE_DEVICES, which submitit ignores; empty for all GPUs, or for UUIDs."""
    names = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return tuple(int(name) for name in names) if all(name.isdigit() for name in names) else ()


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
