"""Two training steps with each engine, which have to have the gradient norms of the plain one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from cit_scale.bench.step_ways import OurStep, Task, Way, draw_batch, freeze_teachers, prepare
from cit_scale.config import MixingConfig, StudentConfig, TeacherConfig
from cit_scale.distributed.world import World, start
from cit_scale.doctor.findings import Asked, Finding, failed, ok
from cit_scale.errors import one_line
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.teachers import Teacher

PLAIN = "plain"
ENGINES = (PLAIN, "fsdp2", "zero0", "zero1", "zero2", "zero3")
STEPS = 2
ALLOWED = 1e-3  # relative difference of a norm: engines add up in another order, by 3e-6 on a CPU
TASK = Task(
    student=StudentConfig("cit_tiny_patch16_224", kwargs={"depth": 2}),
    teachers={"conv": TeacherConfig("regnety_002"), "inv": TeacherConfig("rednet26")},
    image_size=64,
    batch_size=8,
    num_classes=10,
    mixing=MixingConfig(group_size=8),
)


def check(asked: Asked) -> Finding:
    """One rank takes the steps, on one GPU or the CPU."""
    world = World()
    start(world)
    set_arithmetic(world.device)
    try:
        # What teachers say is the same for all: they are no part of an engine.
        teachers = freeze_teachers(prepare(TASK, Way(PLAIN, "float32", compiled=False, teachers="live"), world))
        return judge({engine: norms_of(engine, world, teachers) for engine in ENGINES})
    finally:
        dist.destroy_process_group()


def norms_of(engine: str, world: World, teachers: Sequence[Teacher]) -> list[float] | str:
    """The gradient norms of the steps, or what went wrong."""
    try:
        prepared = prepare(TASK, Way(engine, "float32", compiled=False, teachers="live"), world)
        step = OurStep(prepared, teachers, draw_batch(TASK, world))
        norms = []
        for _ in range(STEPS):
            step()
            assert step.last is not None
            norms.append(step.last.grad_norm)
        return norms
    except Exception as error:  # of any library; the other engines are tried all the same
        return f"{type(error).__name__}: {one_line(error, 200)}"


def judge(found: Mapping[str, Sequence[float] | str]) -> Finding:
    """found: by engine, the gradient norms or what went wrong."""
    plain, wrong = found[PLAIN], []
    for engine, norms in found.items():
        if isinstance(norms, str):
            wrong.append(f"{engine}: {norms}")
        elif not isinstance(plain, str) and not _are_near(norms, plain):
            wrong.append(f"{engine} has the gradient norms {_text(norms)}, {PLAIN} {_text(plain)}")
    if wrong:
        works = [engine for engine in found if not any(each.startswith(engine) for each in wrong)]
        named = [f"--engine.name {each}" for each in works if not each.startswith("zero")]
        named += [f"--engine.ds_config {each}" for each in works if each.startswith("zero")]
        instead = f"; until then train with {' or '.join(named)}" if works else ""
        return failed("; ".join(wrong), f"take the versions of docs/measurements/versions.md{instead}")
    assert not isinstance(plain, str)
    return ok(f"{', '.join(found)}: {STEPS} steps, gradient norms {_text(plain)}")


def _are_near(norms: Sequence[float], plain: Sequence[float]) -> bool:
    return all(abs(ours - theirs) <= ALLOWED * theirs for ours, theirs in zip(norms, plain, strict=True))  # NaN is not


def _text(norms: Sequence[float]) -> str:
    return " and ".join(f"{norm:.4g}" for norm in norms)
