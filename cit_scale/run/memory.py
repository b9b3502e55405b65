"""What is said when a device's memory is used up: what was asked for, what the plan thought, what would fit."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch

from cit_scale.config import RunConfig, split_batch
from cit_scale.errors import ConfigError, DeviceMemoryError, is_out_of_memory, one_line
from cit_scale.run.plan import CERTAINTY, WORKSPACE, estimate_memory, size_text
from cit_scale.run.setup import PreparedRun

P = ParamSpec("P")
T = TypeVar("T")

MOST_OF_THE_ERROR = 40  # characters of it, where it does not say how much was asked for


def explaining_out_of_memory(
    train: Callable[Concatenate[PreparedRun, P], T],
) -> Callable[Concatenate[PreparedRun, P], T]:
    """Decorate a function that trains a prepared run: it raises what ``out_of_memory`` returns.

    On the rank that meets it alone. The others wait in a collective, and the launcher ends them when this one leaves.
    """

    @functools.wraps(train)
    def explaining(prepared: PreparedRun, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return train(prepared, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(prepared, error) from error

    return explaining


def out_of_memory(prepared: PreparedRun, error: BaseException) -> DeviceMemoryError:
    """The error to raise for one that ``is_out_of_memory``. Call it before the device's statistics are reset."""
    used, world = device_use(prepared.world.device), prepared.world
    asked = re.search(r"allocate ([0-9.]+ (?:[KMGT]i?B|bytes))", str(error))
    asked_for = f"for {asked[1]}" if asked else f"in vain ({one_line(error, MOST_OF_THE_ERROR)})"
    beside = f", {size_text(used.others)} held beside tensors" if used.others > WORKSPACE else ""
    try:
        estimate = f"{size_text(estimate_memory(prepared).device)} ({CERTAINTY})"
    except Exception as failure:  # whatever a model's code raises on fake tensors must not hide what happened
        estimate = f"not known ({type(failure).__name__})"
    return DeviceMemoryError(
        f"{prepared.config.name}: out of memory on rank {world.rank}'s {used.device}: it asked {asked_for}; "
        f"{used.peak_text}{beside}; the plan says {estimate}; {way_out(prepared.config, world.world_size)}"
    )


@dataclass(frozen=True)
class DeviceUse:
    """Memory of a device, in bytes. peak: of this process's tensors; None on a CPU, where nobody counts. others: what
    is held beside torch's: by DALI and NCCL, and by other processes."""

    device: str
    total: int = 0
    peak: int | None = None
    others: int = 0

    @property
    def peak_text(self) -> str:
        if self.peak is None:
            return "its peak is not known"
        return f"its peak was {size_text(self.peak)} of {size_text(self.total)}"


def device_use(device: torch.device) -> DeviceUse:
    """The device's memory as it is now."""
    if device.type != "cuda":
        return DeviceUse("CPU")
    name = torch.cuda.get_device_name(device)
    total, peak = torch.cuda.get_device_properties(device).total_memory, torch.cuda.max_memory_allocated(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # a context that is damaged
        return DeviceUse(name, total, peak)
    return DeviceUse(name, total, peak, max(0, total - free - torch.cuda.memory_reserved(device)))


def way_out(config: RunConfig, world_size: int) -> str:
    """What to set: the next smaller micro-batch, or whatever else of the run takes less memory."""
    smaller = smaller_micro_batch(config, world_size)
    if smaller is not None:
        return f"set train.micro_batch_size={smaller}"
    others = []
    if not config.engine.activation_checkpointing:
        others.append("engine.activation_checkpointing=true")
    if world_size > 1 and config.engine.name == "zero" and config.engine.ds_config not in ("zero3", "zero3_offload"):
        others.append("engine.ds_config=zero3")
    if config.engine.precision == "float32":
        others.append("engine.precision=bf16 for a new run")
    others.append("a smaller student, teacher, mixing.group_size or data.image_size")
    micro = split_batch(config, world_size).micro_batch_size
    return f"no micro-batch below {micro} divides: set {', or '.join(others)}"


def smaller_micro_batch(config: RunConfig, world_size: int) -> int | None:
    """The next smaller train.micro_batch_size that cuts a rank's share evenly, in whole mixing groups; None: none."""
    less = split_batch(config, world_size).micro_batch_size - 1
    if less < 1:
        return None
    train = dataclasses.replace(config.train, micro_batch_size=less)
    try:
        return split_batch(dataclasses.replace(config, train=train), world_size).micro_batch_size
    except ConfigError:  # less than one mixing group
        return None
