"""Queue a training run with Slurm, after everything that could fail has been tried here, where somebody is watching.

    python launchers/submit.py --nodes 8 --partition gpu --config cit_base --data.train /data/imagenet/train

Options of this script come first in --help; all other arguments are those of cit_scale/train.py, whose --name names
the job, too. --dry-run shows the plan and the batch script, and queues nothing. Stopped by a time limit, a preemption
or a broken node the job queues itself again and goes on.

    --sweep lr=0.001,0.002 --sweep seed=0,1

queues an array of four runs, each in a run folder of its own such as runs/cit_base-lr=0.001-seed=0.

What a cluster always wants stands in launchers/cluster.yaml, beside this script, by the names of the options; the
command line overrides it, and --setup replaces the file's list:

    partition: gpu
    account: vision
    gpus-per-node: 8
    cpus-per-task: 12
    time: 24:00:00
    setup:
      - module load cuda
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for imports beside this file; the package stands one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os

# Before the imports below: on a login node without GPUs they set variables, among them which accelerator DeepSpeed is
# to use, and sbatch would pass them on to nodes that have GPUs.
STARTED_WITH = frozenset(os.environ)

import contextlib
import dataclasses
import io
import json
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import submitit
import torch
from submitit.core.utils import FailedJobError, FailedSubmissionError, environment_variables

from cit_scale import cli, train
from cit_scale.config import REPOSITORY, DataConfig, RunConfig, plan_batches
from cit_scale.data.reader import Reader
from cit_scale.distributed.lock import exclusive
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.world import World
from cit_scale.engines.build import check_engine
from cit_scale.errors import BadImageError, ConfigError, RefusedError, RunError, exit_code_of
from cit_scale.files import write_text
from cit_scale.job import TrainJob
from cit_scale.run.folders import Run as Folder
from cit_scale.run.plan import counted, describe_memory, describe_plan, estimate_memory, plan_run, row
from cit_scale.run.setup import Task, check_networks, check_settings, open_data, teacher_runs
from cit_scale.run_folder import SUBMISSIONS
from launchers.options import Options, option_argv, parse
from launchers.partitions import (
    NoSlurmError,
    Partition,
    ask_partitions,
    ask_start,
    choose,
    format_minutes,
    parse_minutes,
    share_of_cores,
    why_not,
)
from launchers.state import state_now
from launchers.sweep import sweep

A_YEAR_MIN = 365 * 24 * 60  # submitit's local jobs want a limit


@dataclass(frozen=True)
class Run:
    """argv: of train.py."""

    argv: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Resources:
    """What each run gets.

    minutes, cores_per_rank: None for the partition's limit, and for what the cluster gives to one that does not say.
    node_counts: on how many nodes the runs can go on, the most first; one only where their number is fixed.
    """

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    minutes: int | None
    node_counts: tuple[int, ...]
    cores_per_rank: int | None = None

    def world_on(self, nodes: int) -> World:
        return World(world_size=nodes * self.ranks_per_node, local_world_size=self.ranks_per_node)

    @property
    def min_nodes(self) -> int:
        return min(self.node_counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, plan, submit. Returns the exit code; ``cit_scale.errors`` has their list."""
    try:
        given, train_argv = parse(sys.argv[1:] if argv is None else argv, __doc__)
        return submit(Options(**given), given, train_argv)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (BadImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error)


def submit(options: Options, given: Mapping[str, Any], train_argv: Sequence[str]) -> int:
    """given: the options that were, which a command that submits one run again gives, too."""
    arguments = cli.parse_arguments(train_argv)
    runs = plan_runs(arguments.config, train_argv, options.sweep)
    partitions = find_partitions(options)
    resources = allot(options, partitions, runs)
    same_run = not arguments.fresh and not arguments.override_resume
    task = check_runs(runs, resources.world_on(resources.nodes), same_run=same_run)
    if options.dependency is None:  # one that comes after the other may work in the same folder
        for run in runs:
            refuse_running(run)
    for line in describe(options, resources, partitions, task, runs):
        print(line, flush=True)
    folder = submission_folder(arguments.config, is_sweep=len(runs) > 1)
    executor = slurm_executor(options, resources, runs, folder) if options.cluster == "slurm" else None
    if options.dry_run:
        if executor is not None:
            show_script(batch_script(executor, runs), can_ask=partitions is not None)
        return 0
    if arguments.fresh:
        for run in runs:
            set_aside(run.config.run_dir)
    match options.cluster:
        case "debug":
            return train.main(runs[0].argv)
        case "local":
            jobs = [submit_local(options, resources, runs[0], folder)]
        case _:
            jobs = submit_slurm(executor, runs)
    for run, job in zip(runs, jobs, strict=True):
        note_submission(run, job, options.cluster, given)
        print(f"submitted as job {job.job_id}: {run.config.run_dir}", flush=True)
    logs = " ".join(shlex.quote(str(job.paths.stdout)) for job in jobs)
    print(f"follow with: tail --retry -F {logs}", flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def plan_runs(config: RunConfig, train_argv: Sequence[str], axes: Sequence[str]) -> list[Run]:
    """The runs that a command asks for: one, or those of the sweep."""
    # What stands there is set aside when the run is submitted. A job that queues itself again must not do it.
    argv = [argument for argument in train_argv if argument != "--fresh"]
    if not axes:
        return [Run(tuple(argv), config)]
    each = [(*argv, *more) for more in sweep(config, axes)]
    return [Run(arguments, cli.parse_arguments(arguments).config) for arguments in each]


def find_partitions(options: Options) -> list[Partition] | None:
    """Where the job may start; None where it is none of Slurm's, or in a dry run with no Slurm to ask."""
    if options.cluster != "slurm":
        return None
    try:
        return choose(ask_partitions(), options.partition)
    except NoSlurmError:
        if options.dry_run:
            return None
        raise


def allot(options: Options, partitions: Sequence[Partition] | None, runs: Sequence[Run]) -> Resources:
    """What each run gets. Raises ConfigError for what is contradictory, or never there."""
    if options.cluster != "slurm":
        return allot_here(options, runs)
    gpus = options.gpus_per_node
    if gpus is None:
        # Where some nodes have none, they are not meant.
        known = [gpus for partition in partitions or () for gpus in partition.gpus if gpus]
        gpus = min(known, default=0) if options.ntasks_per_node is None else 0
    ranks = options.ntasks_per_node or gpus or 1
    if gpus and ranks != gpus:
        raise ConfigError(
            f"--ntasks-per-node={ranks} and --gpus-per-node={gpus}, but a rank computes on one GPU; leave out the first"
        )
    minutes = read_time(options.time)
    if partitions is not None:
        reasons = [why_not(each, options.nodes, gpus, minutes) for each in partitions]
        if all(reasons):
            raise ConfigError("; ".join(reason for reason in reasons if reason))
    check_signal_delay(options.signal_delay, minutes, partitions or ())
    cores = options.cpus_per_task or share_of_cores(partitions or (), gpus, ranks)
    return Resources(options.nodes, gpus, ranks, minutes, node_counts(options, ranks, runs), cores)


def allot_here(options: Options, runs: Sequence[Run]) -> Resources:
    """On this machine: all GPUs that are to be seen, or one rank."""
    if len(runs) > 1:
        raise ConfigError(f"a sweep is an array of Slurm's; with --cluster {options.cluster} start its runs one by one")
    minutes = read_time(options.time)
    if options.cluster == "debug":
        return Resources(1, 0, 1, minutes, (1,))
    if options.nodes > 1:
        raise ConfigError(f"--nodes={options.nodes}, but --cluster local is this machine alone")
    found = torch.cuda.device_count()
    gpus = found if options.gpus_per_node is None else options.gpus_per_node
    if gpus > found:
        raise ConfigError(f"--gpus-per-node={gpus}, but this machine shows {found}")
    ranks = gpus or options.ntasks_per_node or 1
    check_signal_delay(options.signal_delay, minutes, ())
    return Resources(1, gpus, ranks, minutes, (1,))


def read_time(text: str | None) -> int | None:
    """In minutes; None for no limit of the run's own."""
    if text is None:
        return None
    try:
        minutes = parse_minutes(text)
    except ValueError as error:
        raise ConfigError(f"--time: {error}") from error
    if minutes == 0:
        raise ConfigError(f"--time={text} is no time to train in")
    return minutes


def check_signal_delay(delay_s: int, minutes: int | None, partitions: Sequence[Partition]) -> None:
    limits = [minutes] if minutes is not None else [each.limit_minutes for each in partitions]
    limit = min((each for each in limits if each is not None), default=None)
    if limit is not None and delay_s >= limit * 60:
        raise ConfigError(
            f"--signal-delay={delay_s} seconds before the time limit, but that is {format_minutes(limit)}; "
            "give more --time or less delay"
        )


def node_counts(options: Options, ranks_per_node: int, runs: Sequence[Run]) -> tuple[int, ...]:
    """From --nodes down to --min-nodes, those among which every run's global batch can be shared out evenly."""
    nodes, fewest = options.nodes, options.min_nodes
    if fewest is None:
        return (nodes,)
    if fewest > nodes:
        raise ConfigError(f"--min-nodes={fewest} is more than --nodes={nodes}")
    counts = [count for count in range(nodes, 0, -1) if all(can_share(run, count * ranks_per_node) for run in runs)]
    if nodes not in counts:
        return (nodes,)  # refused with the whole reason when the run itself is checked
    inside = tuple(count for count in counts if count >= fewest)
    if fewest < nodes and inside == (nodes,):
        fewer = ", ".join(str(count) for count in counts if count < nodes) or "none"
        raise ConfigError(
            f"--min-nodes={fewest}, but below --nodes={nodes}, with {ranks_per_node} ranks a node, the numbers of "
            f"nodes that can share out the global batch evenly are {fewer}"
        )
    return inside


def can_share(run: Run, world_size: int) -> bool:
    try:
        for config in (run.config, *teacher_runs(run.config).values()):
            plan_batches(config, world_size)
            check_engine(config, World(world_size=world_size))
    except ConfigError:
        return False
    return True


def check_runs(runs: Sequence[Run], world: World, *, same_run: bool) -> Task:
    """Raise what ``task.check`` would raise when the runs start. Returns the first, ready to be planned."""
    opened: dict[DataConfig, tuple[Reader, Reader]] = {}
    tried: set[str] = set()
    tasks = []
    for run in runs:
        config = run.config
        check_settings(config, world, same_run=same_run)
        if config.data not in opened:
            train_source, eval_source = open_data(config.data)
            opened[config.data] = Reader(train_source), Reader(eval_source)
        task = Task(config, world, *opened[config.data])
        # A sweep over learning rates or seeds builds the same networks in all its runs.
        networks = repr((config.student, config.teachers, config.data, config.engine, config.train.global_batch_size))
        if networks not in tried:
            check_networks(task)
            tried.add(networks)
        tasks.append(task)
    return tasks[0]


def refuse_running(run: Run) -> None:
    """Raise RefusedError where a job of the same run waits or trains already; "%" in a name is Slurm's."""
    run_dir = run.config.run_dir
    if "%" in run.config.name:
        raise ConfigError(
            f"--name={run.config.name!r}: Slurm takes % and what follows for something else in a log's name"
        )
    state = state_now(Folder(run.config.name, run_dir))
    if state.is_active:
        raise RefusedError(
            f"{run_dir} is {state} already; cancel that first (python launchers/runs.py cancel), "
            "have this one wait for it with --dependency, or give it another --name"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def describe(
    options: Options, resources: Resources, partitions: Sequence[Partition] | None, task: Task, runs: Sequence[Run]
) -> list[str]:
    """The checked plan in lines."""
    lines = []
    if options.cluster == "slurm":
        lines.append(row("job", describe_resources(options, resources, partitions)))
    lines += describe_plan(plan_run(task), device="GPU" if resources.gpus_per_node else "rank")
    so_far = [(Folder(run.config.name, run.config.run_dir), run) for run in runs]
    lines += [row("so far", f"{run.config.run_dir} is {state_now(folder)}") for folder, run in so_far if folder.starts]
    if resources.min_nodes < resources.nodes:
        fewest = dataclasses.replace(task, world=resources.world_on(resources.min_nodes))
        lines.append(
            row(f"on {counted(resources.min_nodes, 'node')}", f"memory {describe_memory(estimate_memory(fewest))}")
        )
    if len(runs) > 1:
        at_once = f", at most {options.array} at once" if options.array else ""
        lines.append(row("sweep", f"{len(runs)} runs{at_once}; what stands above is the first's"))
        lines += [row(f"  {index}", str(run.config.run_dir)) for index, run in enumerate(runs)]
    return lines


def describe_resources(options: Options, resources: Resources, partitions: Sequence[Partition] | None) -> str:
    fewest = f", {resources.min_nodes} at least" if resources.min_nodes < resources.nodes else ""
    kind = counted(resources.gpus_per_node, "GPU") if resources.gpus_per_node else "no GPU"
    cores = f" with {counted(resources.cores_per_rank, 'core')} each" if resources.cores_per_rank else ""
    ranks = f"{counted(resources.ranks_per_node, 'rank')}{cores}"
    if partitions is None:
        limit = format_minutes(resources.minutes) if resources.minutes else "the partition's"
        where = "not compared with partitions, as no Slurm answers here"
    else:
        limits = {format_minutes(resources.minutes or each.limit_minutes) for each in partitions}
        limit = " or ".join(sorted(limits))
        where = f"partition {options.partition or partitions[0].name}"
    nodes = counted(resources.nodes, "node")
    return f"{nodes}{fewest}; on a node {ranks}, {kind}; time limit {limit}; {where}"


def show_script(script: str, *, can_ask: bool) -> None:
    """can_ask: whether there is a Slurm that has an opinion of it."""
    if can_ask:
        print(row("sbatch says", ask_start(script)), flush=True)
    print(f"\n{script}", end="", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, which writes a batch script also where there is no Slurm to take it."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def submission_folder(config: RunConfig, *, is_sweep: bool) -> Path:
    """Where batch scripts, logs and what else submitit writes lie; for a sweep beside its runs' folders."""
    run_dir = config.run_dir.absolute()
    return (run_dir.with_name(f"{run_dir.name}-sweep") if is_sweep else run_dir) / "slurm"


def slurm_executor(options: Options, resources: Resources, runs: Sequence[Run], folder: Path) -> SlurmExecutor:
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


def setup_lines(options: Options, resources: Resources, runs: Sequence[Run]) -> list[str]:
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


def container_arguments(image: str | None, runs: Sequence[Run]) -> list[str]:
    """Of srun, for pyxis."""
    if image is None:
        return []
    mounts = ",".join(f"{path}:{path}" for path in needed_folders(runs))
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


def needed_folders(runs: Sequence[Run]) -> list[Path]:
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


def batch_script(executor: SlurmExecutor, runs: Sequence[Run]) -> str:
    """What sbatch is given."""
    shown = SlurmExecutor(executor.folder, python=executor.python)
    shown.parameters = dict(executor.parameters)
    if len(runs) > 1:
        shown.parameters["map_count"] = len(runs)
    return shown._make_submission_file_text(shown._submitit_command_str, uid="")


def submit_slurm(executor: SlurmExecutor, runs: Sequence[Run]) -> list[submitit.Job]:
    """One job, or an array of them."""
    try:
        # submitit prints sbatch's complaint, and raises it.
        with own_environment(), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            return [executor.submit(TrainJob(run.argv)) for run in runs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refuses: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Within it there are no variables but those that this process was started with."""
    added = {name: os.environ.pop(name) for name in os.environ.keys() - STARTED_WITH}
    try:
        yield
    finally:
        os.environ.update(added)


# ---------------------------------------------------------------------------------------------------------------------
# This machine


def submit_local(options: Options, resources: Resources, run: Run, folder: Path) -> submitit.Job:
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


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def set_aside(run_dir: Path) -> None:
    """Raises RefusedError where another job works in the folder."""
    with StopRequest() as stop, exclusive(run_dir, World(), stop, wait_s=0):
        train.set_aside(run_dir, World())


def note_submission(run: Run, job: submitit.Job, cluster: str, given: Mapping[str, Any]) -> None:
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
    earlier = train.read_note(path) or []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*earlier, about], indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
