"""What Slurm says of its partitions, and whether a job would ever fit one. The parsing is pure: text in, facts out."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cit_scale.errors import ConfigError

PATIENCE_S = 60


class NoSlurmError(ConfigError):
    """Nobody here can say what partitions there are."""


@dataclass(frozen=True)
class Partition:
    """max_nodes: of one job; None for no limit. Times are in minutes, None for none. gpus, cores: of each node."""

    name: str
    is_default: bool
    nodes: int
    max_nodes: int | None = None
    default_minutes: int | None = None
    max_minutes: int | None = None
    gpus: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()

    @property
    def limit_minutes(self) -> int | None:
        """The time limit of a job that asks for none."""
        return self.default_minutes or self.max_minutes


def ask_partitions() -> list[Partition]:
    """Of the Slurm that this machine belongs to. Raises NoSlurmError where there is none, or it does not answer."""
    if shutil.which("sbatch") is None:
        raise NoSlurmError(
            "there is no Slurm here (no sbatch on the PATH); train on this machine with --cluster local or with "
            "'deepspeed cit_scale/train.py', or see with --dry-run what would be submitted"
        )
    partitions = _ask("scontrol", "--all", "show", "partition", "--oneliner")
    nodes = parse_nodes(_ask("sinfo", "--all", "--noheader", "--Node", "--format=%R|%c|%G"))
    return parse_partitions(partitions, nodes)


def ask_start(script: str) -> str:
    """What sbatch says of a batch script without queueing it: when it would start, or why it would not.

    No more than a hint: a job that waits for a broken node is turned down, too.
    """
    said = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=PATIENCE_S)
    return " ".join(f"{said.stdout} {said.stderr}".split()).removeprefix("sbatch: ")


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise NoSlurmError(f"Slurm does not answer, {' '.join(command)}: {said}") from error


def parse_partitions(text: str, nodes: Mapping[str, Sequence[tuple[int, int]]]) -> list[Partition]:
    """From ``scontrol show partition --oneliner``. nodes: by partition, the cores and GPUs of each."""
    found = []
    for line in text.splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" not in facts:
            continue
        name, most = facts["PartitionName"], facts.get("MaxNodes", "UNLIMITED")
        found.append(
            Partition(
                name=name,
                is_default=facts.get("Default") == "YES",
                nodes=int(facts.get("TotalNodes", 0)),
                max_nodes=None if most == "UNLIMITED" else int(most),
                default_minutes=parse_minutes(facts.get("DefaultTime", "NONE")),
                max_minutes=parse_minutes(facts.get("MaxTime", "UNLIMITED")),
                gpus=tuple(gpus for _, gpus in nodes.get(name, ())),
                cores=tuple(cores for cores, _ in nodes.get(name, ())),
            )
        )
    return found


def parse_nodes(text: str) -> dict[str, list[tuple[int, int]]]:
    """By partition, the cores and GPUs of each node; from ``sinfo --Node --format=%R|%c|%G``."""
    found: dict[str, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        partition, cores, resources = line.strip().split("|", 2)
        # gpu:8, gpu:h100:8, gpu:h100:8(S:0-1), several of them with commas between, among others like shard:32
        counts = re.findall(r"(?:^|,)gpu(?::[^:,()]+)??:(\d+)(?=[(,]|$)", resources)
        found.setdefault(partition, []).append((int(cores.rstrip("+")), sum(map(int, counts))))
    return found


def share_of_cores(partitions: Sequence[Partition], gpus_per_node: int, ranks_per_node: int) -> int | None:
    """Cores for each rank: what falls to its GPU on the node where that is least, or of all where there are none.

    None where nothing is known. Slurm's own default is one core, on which a rank's data stream starves.
    """
    shares = [
        cores * gpus_per_node // (gpus * ranks_per_node) if gpus_per_node else cores // ranks_per_node
        for partition in partitions
        for cores, gpus in zip(partition.cores, partition.gpus, strict=True)
        if gpus >= gpus_per_node
    ]
    return max(1, min(shares)) if shares else None


def parse_minutes(text: str) -> int | None:
    """A time limit as Slurm reads and writes it, rounded up to minutes as Slurm does; None for no limit.

    M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)


def format_minutes(minutes: int | None) -> str:
    """As Slurm writes it: [D-]HH:MM:SS."""
    if minutes is None:
        return "UNLIMITED"
    days, rest = divmod(minutes, 24 * 60)
    return f"{f'{days}-' if days else ''}{rest // 60:02d}:{rest % 60:02d}:00"


def choose(partitions: Sequence[Partition], names: str | None) -> list[Partition]:
    """Those that --partition names, with commas between; the default one without it. Raises ConfigError."""
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


def why_not(partition: Partition, nodes: int, gpus_per_node: int, minutes: int | None) -> str | None:
    """Why a job would never start there, or None. minutes: of --time, None without it."""
    name = partition.name
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
