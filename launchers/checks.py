"""Check and plan the runs of a submission: build the networks, open the data, estimate memory. Takes seconds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial

from cit_scale.config import DataConfig
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.engines.build import prepare_engine
from cit_scale.run.auto import with_precision
from cit_scale.run.folders import RunFolder
from cit_scale.run.plan import counted, estimate_memory, memory_text, plan_lines, plan_run, row
from cit_scale.run.setup import PreparedRun, check_all_settings, check_networks, open_images, versions_of, with_images
from launchers.environment import CONTRADICTING
from launchers.options import OF_SBATCH, Options
from launchers.resources import Resources, RunRequest
from launchers.slurm import Partition, format_minutes
from launchers.state import state_now


def check_runs(runs: Sequence[RunRequest], world: World, *, same_run: bool, on_gpus: bool) -> PreparedRun:
    """Raise what ``setup.prepare`` would raise when the runs start. Returns the first run, prepared, for the plan.

    on_gpus: whether they will run on GPUs, which this machine may lack.
    """
    opened: dict[tuple[DataConfig, frozenset[int]], dict[int, tuple[Reader, Reader]]] = {}
    tried: set[str] = set()
    prepared_runs = []
    for run in runs:
        # What auto will stand for on the nodes is a guess here: a GPU of today has bf16.
        decide = partial(with_precision, bf16=on_gpus)
        config = decide(run.config)
        teacher_run_configs = {name: decide(each) for name, each in run.teacher_run_configs.items()}
        setups = check_all_settings(config, teacher_run_configs, world, same_run=same_run)
        versions = versions_of(config, teacher_run_configs) if same_run else {}
        wanted = config.data, frozenset(each.pixels for each in versions.values())
        if wanted not in opened:
            opened[wanted] = open_images(config.data, versions.values())
        prepared = with_images(config, teacher_run_configs, setups, opened[wanted], versions=versions)
        # The runs of a sweep over learning rates or seeds have the same networks: they are tried once.
        train, optim = config.train, config.optim
        parts = (train.global_batch_size, train.freeze, optim.layer_decay, optim.head_lr_scale)
        networks = repr((config.student, config.teachers, config.data, config.engine, parts))
        if networks not in tried:
            check_networks(prepared)
            tried.add(networks)
        prepared_runs.append(prepared)
    return prepared_runs[0]


def submission_lines(
    options: Options,
    resources: Resources,
    partitions: Sequence[Partition] | None,
    prepared: PreparedRun,
    runs: Sequence[RunRequest],
) -> list[str]:
    """The plan that submit.py prints: job, first run, runs already begun, memory on the fewest nodes, sweep."""
    lines = []
    if options.cluster == "slurm":
        lines.append(row("job", resources_text(options, resources, partitions)))
        if ignored := sorted(name for name in os.environ if CONTRADICTING.fullmatch(name) and name not in OF_SBATCH):
            lines.append(row("not counted", f"{', '.join(ignored)}, of which options of this command say the same"))
    device = "GPU" if resources.gpus_per_node else "rank"
    lines += plan_lines(plan_run(prepared), device)
    so_far = [(RunFolder(run.config.name, run.config.run_dir), run) for run in runs]
    lines += [row("so far", f"{run.config.run_dir} is {state_now(folder)}") for folder, run in so_far if folder.starts]
    if resources.min_nodes < resources.nodes:
        setup = prepare_engine(prepared.config, resources.world_on(resources.min_nodes))
        fewest = dataclasses.replace(prepared, engine_setup=setup)
        lines.append(
            row(f"on {counted(resources.min_nodes, 'node')}", f"memory {memory_text(estimate_memory(fewest), device)}")
        )
    if len(runs) > 1:
        at_once = f", at most {options.array} at once" if options.array else ""
        lines.append(row("sweep", f"{len(runs)} runs{at_once}; what stands above is the first's"))
        lines += [row(f"  {index}", str(run.config.run_dir)) for index, run in enumerate(runs)]
    return lines


def resources_text(options: Options, resources: Resources, partitions: Sequence[Partition] | None) -> str:
    """The row "job" of the plan. partitions: None where Slurm was not asked."""
    fewest = f", {resources.min_nodes} at least" if resources.min_nodes < resources.nodes else ""
    kind = counted(int(resources.gpus_per_node), "GPU") if resources.gpus_per_node else "no GPU"
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
