"""Decide what each run of a submission gets: nodes, GPUs, ranks, cores, time; from options and partitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cit_scale.config import RunConfig, split_batch
from cit_scale.errors import ConfigError
from launchers.options import Options
from launchers.partitions import choose, share_of_cores, why_not
from launchers.slurm import (
    Gpus,
    NoSlurmError,
    Partition,
    ask_accounts,
    ask_max_array_size,
    ask_partitions,
    format_minutes,
    parse_minutes,
)

if TYPE_CHECKING:
    from cit_scale.distributed.world import World


@dataclass(frozen=True)
class RunRequest:
    """A run to submit.

    argv: the arguments of train.py. teacher_run_configs: by teacher, the run that trains each teacher without weights.
    """

    argv: tuple[str, ...]
    config: RunConfig
    teacher_run_configs: Mapping[str, RunConfig]


@dataclass(frozen=True)
class Resources:
    """What each run gets.

    minutes: None for the partition's limit. cores_per_rank: None for the cluster's default.
    node_counts: the numbers of nodes that the runs can train on, descending; one number without --min-nodes.
    """

    nodes: int
    gpus_per_node: Gpus
    ranks_per_node: int
    minutes: int | None
    node_counts: tuple[int, ...]
    cores_per_rank: int | None = None

    def world_on(self, nodes: int) -> World:
        """The world of a run on so many nodes, seen from rank 0."""
        from cit_scale.distributed.world import World

        return World(world_size=nodes * self.ranks_per_node, local_world_size=self.ranks_per_node)

    @property
    def min_nodes(self) -> int:
        return min(self.node_counts)


def find_partitions(options: Options) -> list[Partition] | None:
    """The partitions that the job may start in; None for --cluster local and debug, and for a dry run without Slurm."""
    if options.cluster != "slurm":
        return None
    try:
        return choose(ask_partitions(), options.partition)
    except NoSlurmError:
        if options.dry_run:
            return None
        raise


def allot(options: Options, partitions: Sequence[Partition] | None, runs: Sequence[RunRequest]) -> Resources:
    """What each run gets. Raises ConfigError for options that contradict each other or fit no partition."""
    if options.cluster != "slurm":
        return allot_here(options, runs)
    gpus = options.gpus_per_node
    if gpus is not None and partitions is not None:
        partitions = [each.of_kind(gpus.kind) for each in partitions]
    if gpus is None:
        # Nodes without GPUs in the same partition do not count.
        known = [gpus for partition in partitions or () for gpus in partition.gpus if gpus]
        gpus = Gpus(min(known, default=0) if options.ntasks_per_node is None else 0)
    ranks = options.ntasks_per_node or int(gpus) or 1
    if gpus and ranks != gpus:
        raise ConfigError(
            f"--ntasks-per-node={ranks} and --gpus-per-node={gpus}, but a rank computes on one GPU; leave out the first"
        )
    minutes = read_time(options.time)
    if partitions is not None:
        accounts = ask_accounts(options.account) if any(each.is_for_some for each in partitions) else ()
        reasons = [
            why_not(each, options.nodes, gpus, minutes, accounts=accounts, qos=options.qos) for each in partitions
        ]
        if all(reasons):
            raise ConfigError("; ".join(reason for reason in reasons if reason))
        if len(runs) > 1 and (most := ask_max_array_size()) is not None and len(runs) > most:
            raise ConfigError(
                f"--sweep makes {len(runs)} runs, but an array of this Slurm's has at most {most} tasks; sweep in parts"
            )
    check_signal_delay(options.signal_delay, minutes, partitions or ())
    cores = options.cpus_per_task or share_of_cores(partitions or (), gpus, ranks)
    return Resources(options.nodes, gpus, ranks, minutes, node_counts(options, ranks, runs), cores)


def allot_here(options: Options, runs: Sequence[RunRequest]) -> Resources:
    """What a run on this machine gets: a rank for each visible GPU, or one rank. Raises ConfigError."""
    if len(runs) > 1:
        raise ConfigError(f"a sweep is an array of Slurm's; with --cluster {options.cluster} start its runs one by one")
    minutes = read_time(options.time)
    if options.cluster == "debug":
        return Resources(1, Gpus(0), 1, minutes, (1,))
    check_nodes_here(options)
    import torch

    found = torch.cuda.device_count()
    gpus = Gpus(found) if options.gpus_per_node is None else options.gpus_per_node
    if gpus > found:
        raise ConfigError(f"--gpus-per-node={gpus}, but this machine shows {found}")
    ranks = int(gpus) or options.ntasks_per_node or 1
    check_signal_delay(options.signal_delay, minutes, ())
    return Resources(1, gpus, ranks, minutes, (1,))


def check_nodes_here(options: Options) -> None:
    """Raise ConfigError for more nodes than this machine."""
    if options.nodes > 1:
        raise ConfigError(f"--nodes={options.nodes}, but --cluster {options.cluster} is this machine alone")


def read_time(text: str | None) -> int | None:
    """--time in minutes; None where the run sets no limit. Raises ConfigError."""
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
    """Raise ConfigError if the signal to save would come before the run starts. minutes: --time."""
    limits = [minutes] if minutes is not None else [each.limit_minutes for each in partitions]
    limit = min((each for each in limits if each is not None), default=None)
    if limit is not None and delay_s >= limit * 60:
        raise ConfigError(
            f"--signal-delay={delay_s} seconds before the time limit, but that is {format_minutes(limit)}; "
            "give more --time or less delay"
        )


def node_counts(options: Options, ranks_per_node: int, runs: Sequence[RunRequest]) -> tuple[int, ...]:
    """The numbers from --nodes down to --min-nodes whose ranks divide every run's global batch evenly."""
    nodes, fewest = options.nodes, options.min_nodes
    if fewest is None:
        return (nodes,)
    if fewest > nodes:
        raise ConfigError(f"--min-nodes={fewest} is more than --nodes={nodes}")
    counts = [count for count in range(nodes, 0, -1) if all(can_share(run, count * ranks_per_node) for run in runs)]
    if nodes in counts and any(count >= fewest for count in counts if count < nodes):
        counts = [count for count in counts if all(can_host(run, count * ranks_per_node) for run in runs)]
    if nodes not in counts:
        return (nodes,)  # submit() refuses it with the whole reason when it checks the runs
    inside = tuple(count for count in counts if count >= fewest)
    if fewest < nodes and inside == (nodes,):
        fewer = ", ".join(str(count) for count in counts if count < nodes) or "none"
        raise ConfigError(
            f"--min-nodes={fewest}, but below --nodes={nodes}, with {ranks_per_node} ranks a node, the numbers of "
            f"nodes that can share out the global batch evenly are {fewer}"
        )
    return inside


def can_share(run: RunRequest, world_size: int) -> bool:
    """Whether so many ranks divide the global batches of the run and its teachers' runs."""
    try:
        for config in (run.config, *run.teacher_run_configs.values()):
            split_batch(config, world_size)
    except ConfigError:
        return False
    return True


def can_host(run: RunRequest, world_size: int) -> bool:
    """Whether the engines of the run and its teachers' runs work with so many ranks."""
    from cit_scale.distributed.world import World
    from cit_scale.engines.build import prepare_engine  # DeepSpeed's settings take seconds to import

    try:
        for config in (run.config, *run.teacher_run_configs.values()):
            prepare_engine(config, World(world_size=world_size))
    except ConfigError:
        return False
    return True
