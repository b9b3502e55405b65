"""Batch scripts and jobs by submitit: Slurm's, and those of this machine."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

from cit_scale.config import REPOSITORY
from cit_scale.errors import ConfigError
from cit_scale.job import TrainJob
from launchers.environment import own_environment
from launchers.options import Options
from launchers.resources import Resources, RunRequest

A_YEAR_MIN = 365 * 24 * 60  # submitit's local jobs want a limit

# ---------------------------------------------------------------------------------------------------------------------
# Slurm


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which writes a batch script also where there is no Slurm to take it."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def slurm_executor(options: Options, resources: Resources, runs: Sequence[RunRequest], folder: Path) -> SlurmExecutor:
    executor = SlurmExecutor(folder, python=None if options.container is None else "python3")
    additional: dict[str, Any] = {"requeue": True}
    if options.mem is not None:
        additional["mem"] = options.mem  # submitit's own takes gigabytes only
    if resources.min_nodes < resources.nodes:
        additional["nodes"] = f"{resources.min_nodes}-{resources.nodes}"
        # Told how many tasks a node has, Slurm gives the fewest nodes although more are free. setup_lines says it to
        # env.sh, and the cores are those of a node.
        cores = resources.cores_per_rank and resources.cores_per_rank * resources.ranks_per_node
        tasks = {"cpus_per_task": cores}
    else:
        tasks = {"ntasks_per_node": resources.ranks_per_node, "cpus_per_task": resources.cores_per_rank}
    parameters: dict[str, Any] = {
        "job_name": runs[0].config.name if len(runs) == 1 else folder.parent.name,
        "nodes": resources.nodes,
        **tasks,
        "gpus_per_node": resources.gpus_per_node or None,
        # Left out, they are the cluster's: submitit would write five minutes, and its name as the workload's.
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
        "array_parallelism": options.array or len(runs),
        "additional_parameters": additional,
        "setup": setup_lines(options, resources, runs),
        "srun_args": container_arguments(options.container, runs),
    }
    executor.update_parameters(**parameters)
    return executor


def setup_lines(options: Options, resources: Resources, runs: Sequence[RunRequest]) -> list[str]:
    """What a batch script does before the ranks start. slurm/env.sh reads the variables and the arguments."""
    checkout = shlex.quote(str(REPOSITORY))
    lines = [
        *options.setup,
        f"export CIT_SCALE={checkout} CIT_PYTHON={shlex.quote(sys.executable)} CIT_MAX_RESTARTS={options.max_restarts}",
        'export PYTHONPATH="$CIT_SCALE${PYTHONPATH:+:$PYTHONPATH}"',
    ]
    if len(resources.node_counts) > 1:
        lines.append(f"export SLURM_NTASKS_PER_NODE={resources.ranks_per_node}")
        lines.append(f'export CIT_NODE_COUNTS="{" ".join(map(str, resources.node_counts))}"')
    if len(runs) == 1:
        lines.append(f"set -- {shlex.join(runs[0].argv)}".rstrip())
    else:
        cases = [f"  {index}) set -- {shlex.join(run.argv)} ;;" for index, run in enumerate(runs)]
        lines += ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
    return [*lines, f"source {checkout}/slurm/env.sh"]


def container_arguments(image: str | None, runs: Sequence[RunRequest]) -> list[str]:
    """Of srun, for pyxis."""
    if image is None:
        return []
    mounts = ",".join(f"{path}:{path}" for path in needed_folders(runs))
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


def needed_folders(runs: Sequence[RunRequest]) -> list[Path]:
    """Whatever a rank reads or writes, by settings and arguments: folders, without those inside others."""
    paths = {REPOSITORY, Path.cwd()}
    for run in runs:
        config = run.config
        paths |= {Path(config.runs_dir).expanduser(), Path(config.data.cache_dir).expanduser()}
        texts = [argument.partition("=")[2] or argument for argument in run.argv]
        texts += [config.data.train, config.data.eval, config.engine.ds_config, config.student.weights]
        texts += [text for teacher in config.teachers.values() for text in (teacher.weights, teacher.recipe)]
        files = [Path(text).expanduser() for text in texts if text]
        paths |= {file.parent if file.is_file() else file for file in files if file.exists()}
    folders = {path.absolute() for path in paths}
    return sorted(path for path in folders if not any(parent in folders for parent in path.parents))


def batch_script(executor: SlurmExecutor, runs: Sequence[RunRequest]) -> str:
    """What sbatch is given."""
    shown = SlurmExecutor(executor.folder, python=executor.python)
    shown.parameters = dict(executor.parameters)
    if len(runs) > 1:
        shown.parameters["map_count"] = len(runs)
    return shown._make_submission_file_text(shown._submitit_command_str, uid="")


def submit_slurm(executor: SlurmExecutor, runs: Sequence[RunRequest]) -> list[submitit.Job]:
    """One job, or an array of them."""
    try:
        # submitit prints sbatch's complaint, and raises it.
        with own_environment(), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(TrainJob(run.argv)) for run in runs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refuses: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------------------------------------------------------------
# This machine


def submit_local(options: Options, resources: Resources, run: RunRequest, folder: Path) -> submitit.Job:
    """In the background, on this machine; returns at once."""
    executor = submitit.LocalExecutor(folder)
    executor.update_parameters(
        tasks_per_node=resources.ranks_per_node,
        gpus_per_node=resources.gpus_per_node,
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
    """What is started within it does not hold on to this process's output: whoever reads that need not wait for it."""
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
    """Those that CUDA_VISIBLE_DEVICES leaves, by number; submitit would count from 0 whatever it says."""
    names = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return tuple(int(name) for name in names) if all(name.isdigit() for name in names) else ()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
