"""Reads rank and world size from the environment of any launcher. Imports the standard library only.

The command line is checked before PyTorch is imported, and that check needs the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# One row per launcher: the variables of rank, local rank, world size, ranks on this node. The first row whose rank is
# set wins: torchrun or deepspeed started inside a Slurm allocation take precedence over Slurm's own variables.
SPELLINGS = {
    "torchrun, deepspeed": ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    "submitit": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS", ()),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", ("SLURM_NTASKS_PER_NODE",)),
}


class Ranks(NamedTuple):
    """A process among all processes of a job, as in ``torch.distributed``.

    rank is in [0, world_size), local_rank in [0, local_world_size); local_world_size is the number of ranks on this
    node.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    def check(self) -> None:
        """Raise ValueError if rank or local_rank is negative or not below its size."""
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise ValueError(
                f"rank={self.rank} of world_size={self.world_size} and local_rank={self.local_rank} of "
                f"local_world_size={self.local_world_size} do not fit; each rank must be below its size"
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Ranks:
        """Read the variables of DeepSpeed, torchrun, submitit or srun. Without any, returns rank 0 of world size 1.

        Raises ValueError if only some of a launcher's variables are set, if one is no whole number, or if a rank is not
        below its size.
        """
        for launcher, (rank, local_rank, world_size, local_sizes) in SPELLINGS.items():
            if rank not in env:
                continue
            # Slurm sets SLURM_PROCID in the batch script as well, where no ranks were started; only srun sets
            # SLURM_STEP_ID.
            if launcher == "srun" and "SLURM_STEP_ID" not in env:
                continue
            missing = [name for name in (local_rank, world_size) if name not in env]
            if missing:
                raise ValueError(
                    f"{rank}={env[rank]} is set but {', '.join(missing)} is not; set all or none ({launcher})"
                )
            size = _whole_number(world_size, env)
            # Without a variable for it, all ranks are taken to be on this node.
            local_size = next((_whole_number(name, env) for name in local_sizes if name in env), size)
            ranks = cls(_whole_number(rank, env), _whole_number(local_rank, env), size, local_size)
            ranks.check()
            return ranks
        return cls()


def _whole_number(name: str, env: Mapping[str, str]) -> int:
    """The value of a variable. Raises ValueError that names it."""
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(f"{name}={env[name]!r} in the environment is no whole number; a launcher sets it") from None
