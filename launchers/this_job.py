"""What this job is, by Slurm's own word: how many ranks it has, and where they meet. slurm/env.sh evaluates the answer.

    python launchers/this_job.py --host-file FILE --node-counts "8 4 2" --ranks-per-node 4

sbatch passes on the variables of the shell that it is called from, and Slurm replaces only those that the new job asked
for: a job that is queued from within another one finds that one's tasks, its place in an array, its restarts. So Slurm
is asked for the job by its id, once at each start. What follows is handed to srun and the ranks in variables, and those
that could contradict it are unset.

Prints lines of shell. Exit code 2 for what no run can be, 1 where Slurm does not answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python searches this file's folder for imports; the package lies one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence

from cit_scale.errors import ConfigError, error_line
from launchers.environment import STALE
from launchers.slurm import SlurmError, ThisJob, ask_this_job

CHOSEN = "CIT_CHOSEN"
"""The variables that were chosen here because the user had not set them: a job that is queued from here finds them."""


def variables(
    job: ThisJob, node_counts: Sequence[int], ranks_per_node: int | None, env: Mapping[str, str]
) -> dict[str, str]:
    """What srun and the ranks are to know. Raises ConfigError.

    node_counts: the numbers of nodes that can share out the global batch; empty for any. ranks_per_node: None for what
    the job was asked for: as many as --ntasks-per-node says, else one on each GPU, else a share of --ntasks, else one.
    """
    allotted = len(job.hosts)
    nodes = max((count for count in node_counts if count <= allotted), default=allotted)
    hosts = job.hosts[:nodes]
    ranks = ranks_per_node or job.ranks_per_node or job.gpus or share(job.ranks, allotted)
    cores = max(1, job.cores // ranks)
    own = {
        # The ranks meet on the first node. The port follows from job and restart, so that two jobs on one node, or two
        # starts of one job, use different ones. It lies below Linux's range of ephemeral ports.
        "MASTER_PORT": str(20000 + (job.number + 7 * job.restarts) % 12000),
        # Otherwise each rank would start a thread for every core of the node.
        "OMP_NUM_THREADS": str(cores),
    }
    theirs = dict(word.partition("=")[::2] for word in env.get(CHOSEN, "").split())
    chosen = {name: value for name, value in own.items() if env.get(name) in (None, theirs.get(name))}
    return {
        **chosen,
        CHOSEN: " ".join(f"{name}={value}" for name, value in chosen.items()),
        "MASTER_ADDR": hosts[0],
        "CIT_JOB_ID": job.job_id,
        "CIT_RESTARTS": str(job.restarts),
        "CIT_HOSTS": " ".join(hosts),
        "CIT_GPUS_PER_NODE": str(job.gpus),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        # A node's ranks follow each other, as many on each. With unlike numbers of cores srun would put more ranks
        # where there are more: there it goes by a file with the host of each.
        "SLURM_DISTRIBUTION": "arbitrary" if job.is_uneven else "block",
        # Each rank is bound to its own share of the cores. Otherwise its threads, DALI's too, move between sockets.
        "SLURM_CPU_BIND": "cores",
        "SLURM_CPUS_PER_TASK": str(cores),
        "SRUN_CPUS_PER_TASK": str(cores),
        # All memory that the job has on a node, however it was asked for.
        "SLURM_MEM_PER_NODE": "0",
    }


def rank_hosts(found: Mapping[str, str]) -> list[str]:
    """The host of each rank. found: from ``variables``."""
    return [host for host in found["CIT_HOSTS"].split() for _ in range(int(found["SLURM_NTASKS_PER_NODE"]))]


def share(ranks: int, nodes: int) -> int:
    """Of --ntasks on each node. Raises ConfigError."""
    if ranks > nodes and ranks % nodes:
        raise ConfigError(
            f"--ntasks={ranks} cannot be shared out evenly over {nodes} nodes; give --ntasks-per-node instead"
        )
    return max(1, ranks // nodes)


def main(argv: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    """Ask, and print the lines. Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--node-counts", default="", help="numbers of nodes that can share out the global batch")
    parser.add_argument("--ranks-per-node", default="", help="where it is not what the job was asked for")
    parser.add_argument("--host-file", required=True, help="where the host of each rank may be written")
    asked = parser.parse_args(argv)
    try:
        job = ask_this_job(env["SLURM_JOB_ID"])
        counts = [int(count) for count in asked.node_counts.split()]
        found = variables(job, counts, int(asked.ranks_per_node or 0) or None, env)
        if job.is_uneven:
            found["SLURM_HOSTFILE"] = asked.host_file
            Path(asked.host_file).write_text("".join(f"{host}\n" for host in rank_hosts(found)))
    except ConfigError as error:
        print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, SlurmError) else error.exit_code
    for name in sorted(name for name in env if STALE.fullmatch(name) and name not in found):
        if not (job.is_of_array and name.startswith("SLURM_ARRAY_")):  # Slurm has set all of these anew
            print(f"unset {name}")
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
