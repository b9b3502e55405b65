"""What ``auto`` stands for on this machine, decided at a run's first start.

The decision is written into config.yaml and the checkpoints like any other value, and every later start goes on with it
(``run.begun``): neither another machine nor another version changes what is learned.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Literal

import torch

from cit_scale.config import RunConfig
from cit_scale.distributed.world import broadcast, gather, run_on_all_ranks
from cit_scale.errors import ConfigError
from cit_scale.run.flops import forward_flops
from cit_scale.run.setup import PreparedRun, compiler_lacks, python_headers
from cit_scale.settings import AUTO

# Of a teacher's forward pass on a CPU, by docs/measurements/step.md: seconds that compiling it takes, the share of its
# time that it gains with AVX-512 (with AVX2 alone nothing), and a thread's rate in FLOP/s.
COMPILE_S = 20.0
GAIN = 0.06
FLOPS_PER_S = 50e9


def has_bf16(device: torch.device) -> bool:
    """Whether ``auto`` means bf16 there. On a CPU it never does: few have its instructions."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def with_precision(config: RunConfig, *, bf16: bool) -> RunConfig:
    """``config`` with the precisions that ``auto`` stands for. bf16: as ``has_bf16``."""
    precision: Literal["bf16", "float32"] = "bf16" if bf16 else "float32"
    engine, distill = config.engine, config.distill
    if engine.precision == AUTO:
        engine = dataclasses.replace(engine, precision=precision)
    if distill.teacher_precision == AUTO:
        distill = dataclasses.replace(distill, teacher_precision=precision)
    return dataclasses.replace(config, engine=engine, distill=distill)


def with_compile(prepared: PreparedRun) -> PreparedRun:
    """Collective. The run, and its teachers' runs, with what ``auto`` stands for in their ``compile``."""
    # Nodes may differ: what one of them cannot do is not done, and for the rest rank 0's decides.
    able = all(gather(prepared.world, _can_compile(prepared.world.device)))
    return _decide_compile(prepared, able=able)


def _decide_compile(prepared: PreparedRun, *, able: bool) -> PreparedRun:
    """Collective. As ``with_compile``. able: whether all nodes can compile."""
    teacher_runs: Mapping[str, PreparedRun] = {
        name: _decide_compile(teacher_run, able=able) for name, teacher_run in prepared.teacher_runs.items()
    }
    config = broadcast(prepared.world, run_on_all_ranks(prepared.world, lambda: _with_compile(prepared, able=able)))
    setup = dataclasses.replace(prepared.engine_setup, engine=config.engine)
    return dataclasses.replace(prepared, config=config, engine_setup=setup, teacher_runs=teacher_runs)


def _can_compile(device: torch.device) -> bool:
    """Whether this node has what torch.compile needs."""
    return compiler_lacks(device.type, os.environ, python_headers()) is None


def _with_compile(prepared: PreparedRun, *, able: bool) -> RunConfig:
    config = prepared.config
    engine, distill = config.engine, config.distill
    if engine.compile == AUTO:
        engine = dataclasses.replace(engine, compile=able and _compiles_student(prepared))
    if distill.compile == AUTO:
        compile_teachers = able and bool(config.teachers) and _compiles_teachers(prepared)
        distill = dataclasses.replace(distill, compile=compile_teachers)
    return dataclasses.replace(config, engine=engine, distill=distill)


def _compiles_student(prepared: PreparedRun) -> bool:
    if prepared.world.device.type == "cpu":
        return False
    ds_config = prepared.engine_setup.ds_config
    return ds_config is None or ds_config["zero_optimization"]["stage"] < 3


def _compiles_teachers(prepared: PreparedRun) -> bool:
    """On a CPU: whether all that the teachers compute in the run is long enough for compiling them to pay."""
    if prepared.world.device.type != "cpu":
        return True
    if not torch.cpu._is_avx512_supported():
        return False
    config = prepared.config
    images = prepared.total_steps * config.train.global_batch_size / prepared.world.world_size
    with torch.device("meta"):
        teachers = [prepared.build_teacher_without_weights(teacher) for teacher in config.teachers.values()]
    try:
        flops = sum(forward_flops(teacher, config.data.image_size) for teacher in teachers)
    except (ConfigError, RuntimeError):  # a model of timm's that cannot be counted without data
        return False
    seconds = images * flops / (FLOPS_PER_S * torch.get_num_threads())
    return GAIN * seconds > COMPILE_S * len(teachers)
