"""Which rank this process is, out of any launcher's environment. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# One row per launcher: rank, local rank, world size, ranks on this node. The first row whose rank is set wins, so a
# torchrun or deepspeed started inside a Slurm allocation is believed before Slurm's own variables.
SPELLINGS = {
    "torchrun, deepspeed": ("RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    "submitit": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS", ()),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", ("SLURM_NTASKS_PER_NODE",)),
}


class Ranks(NamedTuple):
    """rank in [0, world_size), local_rank in [0, local_world_size)."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    def check(self) -> None:
        """Raise ValueError where a rank is not below its size."""
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise ValueError(
                f"rank={self.rank} of world_size={self.world_size} and local_rank={self.local_rank} of "
                f"local_world_size={self.local_world_size} do not fit; each rank must be below its size"
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Ranks:
        """Read DeepSpeed's, torchrun's, submitit's or srun's variables; without any, one process alone.

        Raises ValueError for half of them, and for ranks that do not fit.
        """
        for launcher, (rank, local_rank, world_size, local_sizes) in SPELLINGS.items():
            if rank not in env:
                continue
            # Inside a batch script Slurm sets SLURM_PROCID too; only srun sets the step.
            if launcher == "srun" and "SLURM_STEP_ID" not in env:
                continue
            missing = [name for name in (local_rank, world_size) if name not in env]
            if missing:
                raise ValueError(
                    f"{rank}={env[rank]} is set but {', '.join(missing)} is not; set all or none ({launcher})"
                )
            size = int(env[world_size])
            local_size = next((int(env[name]) for name in local_sizes if name in env), size)
            ranks = cls(int(env[rank]), int(env[local_rank]), size, local_size)
            ranks.check()
            return ranks
        return cls()
