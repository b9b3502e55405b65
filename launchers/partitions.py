"""Match a job with partitions: those it names, why it would never start in one, the cores of each rank."""

from __future__ import annotations

from collections.abc import Sequence

from cit_scale.errors import ConfigError
from launchers.slurm import Partition, format_minutes


def share_of_cores(partitions: Sequence[Partition], gpus_per_node: int, ranks_per_node: int) -> int | None:
    """Cores for each rank: its GPU's share of a node's cores, or an equal share of all cores where a job takes no GPU.

    The smallest share among the nodes that have enough GPUs. None where no such node is known. Slurm's own default is
    one core, on which a rank's data stream starves.
    """
    shares = [
        cores * gpus_per_node // (gpus * ranks_per_node) if gpus_per_node else cores // ranks_per_node
        for partition in partitions
        for cores, gpus in zip(partition.cores, partition.gpus, strict=True)
        if gpus >= gpus_per_node
    ]
    return max(1, min(shares)) if shares else None


def choose(partitions: Sequence[Partition], names: str | None) -> list[Partition]:
    """The partitions that --partition names, comma-separated; the default partition without it. Raises ConfigError."""
    known = ", ".join(f"{each.name} (the default)" if each.is_default else each.name for each in partitions)
    if names is None:
        default = [each for each in partitions if each.is_default]
        if not default:
            raise ConfigError(f"this Slurm has no default partition; choose one with --partition: {known}")
        return default
    by_name = {each.name: each for each in partitions}
    for name in names.split(","):
        if name not in by_name:
            raise ConfigError(f"no partition is called {name!r}; those there are: {known}")
    return [by_name[name] for name in names.split(",")]


def why_not(
    partition: Partition,
    nodes: int,
    gpus_per_node: int,
    minutes: int | None,
    *,
    accounts: Sequence[str] = (),
    qos: str | None = None,
) -> str | None:
    """Why a job would never start in the partition; None if it could. minutes: --time, None without it.

    accounts: the job's, and those above it, one of which may stand for it; empty where they are not known.
    """
    name = partition.name
    if partition.state != "UP":
        return f"partition {name} is {partition.state.lower()}: no job starts there"
    if accounts and partition.accounts is not None and not _among(accounts, partition.accounts):
        return (
            f"the job's account is {accounts[0]}, but partition {name} is for {', '.join(partition.accounts) or 'none'}"
        )
    if accounts and partition.accounts is None and _among(accounts[:1], partition.not_accounts):
        return f"the job's account is {accounts[0]}, but partition {name} is not for that account"
    if qos is not None and partition.qos is not None and not _among([qos], partition.qos):
        return f"--qos={qos}, but partition {name} takes {', '.join(partition.qos)}"
    if nodes > partition.nodes:
        return f"--nodes={nodes}, but partition {name} has {partition.nodes}"
    if partition.max_nodes is not None and nodes > partition.max_nodes:
        return f"--nodes={nodes}, but partition {name} gives a job at most {partition.max_nodes}"
    enough = sum(gpus >= gpus_per_node for gpus in partition.gpus)
    if gpus_per_node and partition.gpus and enough < nodes:
        return (
            f"--nodes={nodes} --gpus-per-node={gpus_per_node}, but of the nodes of partition {name} {enough} have so "
            f"many GPUs; the most that one has: {max(partition.gpus)}"
        )
    if minutes is not None and partition.max_minutes is not None and minutes > partition.max_minutes:
        return (
            f"--time={format_minutes(minutes)}, but partition {name} allows {format_minutes(partition.max_minutes)}; "
            "with less a run saves before the limit, queues again and goes on"
        )
    return None


def _among(names: Sequence[str], known: Sequence[str]) -> bool:
    """Whether one of the names is known. Slurm does not tell their capitals from small letters."""
    return bool({name.casefold() for name in names} & {name.casefold() for name in known})
