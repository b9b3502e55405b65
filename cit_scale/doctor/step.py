"""Training steps over the data stream, beside what the plan of a run expects of their parts and of their memory."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from contextlib import closing

import torch
import torch.distributed as dist

from cit_scale.bench.measure import seconds
from cit_scale.bench.plain_port import LR
from cit_scale.bench.step_ways import Task, Way, freeze_teachers, prepare
from cit_scale.config import StudentConfig, TeacherConfig
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World, start
from cit_scale.doctor.devices import share_of_threads
from cit_scale.doctor.findings import Asked, Finding, failed, ok
from cit_scale.doctor.photographs import photographs
from cit_scale.engines.build import build_engine
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.run.auto import has_bf16
from cit_scale.run.forecast import time_parts
from cit_scale.run.plan import estimate_memory
from cit_scale.run.setup import PreparedRun
from cit_scale.train import train_step

WARM_UP, STEPS = 2, 6
ROOM, LEAST = 0.8, 8  # share of the free memory that the plan may fill; images of a step
SLOW = 0.6  # of what the parts take one by one; trial steps have been up to a fifth off
SMALL = Task(
    student=StudentConfig("cit_tiny_patch16_224"),
    teachers={"conv": TeacherConfig("regnety_006"), "inv": TeacherConfig("rednet26")},
    image_size=64,
    batch_size=16,
    num_classes=2,  # of the made-up photographs
)
PAPERS = Task(
    student=StudentConfig("cit_small_patch16_224"),
    teachers={"conv": TeacherConfig("regnety_040"), "inv": TeacherConfig("rednet101")},
    image_size=224,
    batch_size=128,
    num_classes=2,
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Images per second: of the loop, of its parts one by one, of data and networks alone; and bytes at the peak of a
    GPU's memory, measured and as planned; 0 without a GPU. skipped: steps whose gradient was not finite.
    """

    loop: float
    expected: float
    data: float
    networks: float
    skipped: int = 0
    peak: int = 0
    planned: int = 0


def check(asked: Asked) -> Finding:
    """Train some steps, on one GPU with the paper's networks, on a CPU with small ones."""
    world = World()
    task = SMALL if world.device.type == "cpu" else PAPERS
    start(world)
    set_arithmetic(world.device)
    try:
        prepared, task = prepare_to_fit(task, world)
        with photographs(task.batch_size) as source:
            reader = Reader(source)
            data = dataclasses.replace(prepared.config.data, decode_threads=share_of_threads())
            config = dataclasses.replace(prepared.config, data=data)
            prepared = dataclasses.replace(prepared, config=config, train_images=reader, eval_images=reader)
            return judge(measure(prepared), task, world.device)
    finally:
        dist.destroy_process_group()


def prepare_to_fit(task: Task, world: World) -> tuple[PreparedRun, Task]:
    """The run, and the task with as many images as the plan finds room for on this GPU, down to LEAST."""
    way = Way("plain", "bf16" if has_bf16(world.device) else "float32", compiled=False, teachers="live")
    prepared = prepare(task, way, world)
    if world.device.type == "cuda":
        free = ROOM * torch.cuda.mem_get_info(world.device)[0]
        while task.batch_size > LEAST and estimate_memory(prepared).device > free:
            task = dataclasses.replace(task, batch_size=task.batch_size // 2)
            prepared = prepare(task, way, world)
    return prepared, task


def measure(prepared: PreparedRun) -> Measured:
    """Time the parts, then the loop of them."""
    device, images = prepared.world.device, prepared.config.train.global_batch_size
    has_gpu = device.type == "cuda"
    parts = time_parts(prepared, lambda: False)
    if has_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    teachers = freeze_teachers(prepared)
    engine = build_engine(prepared.build_student(), prepared.engine_setup)
    engine.module.train()
    with closing(prepared.train_batches(0)) as batches:
        numbers, results = itertools.count(), []

        def step() -> None:
            results.append(train_step(engine, teachers, batches, prepared, next(numbers), LR).result)

        for _ in range(WARM_UP):
            step()
        step_s = seconds(step, device, STEPS)
    memory = estimate_memory(prepared)
    return Measured(
        loop=images / step_s,
        expected=images / parts.micro_step_s(device),
        data=images / parts.data_s,
        networks=images / (parts.update_s + parts.advice_s),
        skipped=sum(result.skipped for result in results),
        peak=torch.cuda.max_memory_allocated(device) if has_gpu else 0,
        # What DALI and the driver hold is not PyTorch's.
        planned=memory.device - memory.workspace - memory.batches if has_gpu else 0,
    )


def judge(found: Measured, task: Task, device: torch.device) -> Finding:
    """task, device: what was trained, and where."""
    networks = ", ".join([task.student.name, *(teacher.model for teacher in task.teachers.values())])
    says = (
        f"{found.loop:.3g} images/s of {task.image_size} pixels, {found.expected:.3g} expected of its parts; {networks}"
    )
    if found.planned:
        says += f"; {found.peak / 2**30:.1f} GiB at the peak, {found.planned / 2**30:.1f} planned"
    figures = {"images_per_s": found.loop, "expected_images_per_s": found.expected}
    if found.skipped:
        return failed(
            f"{says}; {found.skipped} of {WARM_UP + STEPS} gradients were not finite",
            "see the rows of precision and involution",
        )
    advice = []
    if found.loop < SLOW * found.expected:
        advice.append("something else takes the cores or the GPU (top, nvidia-smi): time it again without")
    if device.type == "cuda" and found.data < found.networks:
        advice.append(
            f"the data stream gives {found.data:.0f} images/s, the networks take {found.networks:.0f}: more cores for "
            "each GPU (data.decode_threads), or images packed at a smaller size (cit-scale pack)"
        )
    if found.peak > 1.2 * found.planned:
        advice.append("the plan's estimate of memory is too low here: leave room, and report it")
    return Finding("warning", says, "; ".join(advice), {}, figures) if advice else ok(says, figures=figures)
