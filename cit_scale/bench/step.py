"""Benchmark of one training step on images that lie on the device: the trainer's against a plain port of the paper's.

    python -m cit_scale.bench.step
    python -m cit_scale.bench.step --student cit_small_patch16_224 --conv regnety_040 --inv rednet101 \\
        --image-size 224 --batch-size 128 --engines plain,fsdp2,zero0,zero1,zero2,zero3 --precisions float32,bf16 \\
        --teachers live,none --json step.json

On the GPU, if PyTorch sees one. All ways take turns within a round. Under torchrun each rank has a batch of its own,
and the port trains on each rank alone. Columns:
- port / it: the time of the port's step over that of this one.
- of mm: the floating-point operations of a step, as run/flops.py counts them, in a second, over those of a large square
  torch.mm in the same precision.
- mfu: those operations over the peak of the GPU in that precision, where run/flops.py knows it.
- idle: on a GPU, the share of a step's time in which no kernel runs, by the profiler.
- host: on a GPU, the time until an idle device has been given a step, over the time of a step.
- peak: of the memory of state, teachers and step; the plan is that of ``python launchers/submit.py --dry-run``.
"compiled" are student and teachers, and at ZeRO-3 the teachers alone. Ways that compile alike share what is compiled:
the first step of the first of them takes all the time for it.
"deterministic" is what engine.deterministic does: --deterministic both, for its cost.
"none" for teachers is the same student and loss, with logits of the teachers that are there already.

Ends with 1 where none of the ways that were asked for could be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from cit_scale.bench.measure import machine_text, output_file, ratio, seconds, spread, table, take_turns
from cit_scale.bench.step_ways import (
    ENGINES,
    PORT,
    PRECISIONS,
    TEACHERS,
    OurStep,
    PortStep,
    Task,
    Way,
    draw_batch,
    freeze_teachers,
    prepare,
    recorded,
)
from cit_scale.bench.watch import PARTS, PartClock, Watch, allocated_bytes, enqueue_ms, idle_share
from cit_scale.config import MixingConfig, StudentConfig, TeacherConfig
from cit_scale.distributed.world import World, start
from cit_scale.errors import ConfigError, one_line
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.models.network import AUTOCAST, tensors_of
from cit_scale.run.flops import forward_flops, peak_flops
from cit_scale.run.plan import estimate_memory
from cit_scale.run.results import device_name
from cit_scale.run.setup import PreparedRun
from cit_scale.teachers import Teacher
from cit_scale.text import positive

OFF_ON = {"off": (False,), "on": (True,), "both": (False, True)}
RESIZE_STORAGES = ("fsdp2", "zero3", "zero2_offload", "zero3_offload")  # Watch does not see all of their memory
MIB = 2**20


@dataclass
class Figures:
    """Of one way. Lists have a figure for each round. Memory in MiB; None: cannot be measured here.

    first_s: of the first step, which compiles. flops: of a step, on this rank. plan_mib: the plan's estimate.
    operators: of a step, by part; empty for compiled ones. parts_ms: medians. skipped: steps without an update.
    """

    first_s: float
    flops: float
    plan_mib: float | None
    peak_mib: float | None = None
    host_share: float | None = None
    idle_share: float | None = None
    skipped: int = 0
    operators: dict[str, int] = field(default_factory=dict)
    parts_ms: dict[str, float] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Bench:
    """Builds and times the steps of a task. refused: the ways that could not be measured, and why."""

    def __init__(self, task: Task, world: World) -> None:
        self.task, self.world, self.device = task, world, world.device
        self.refused: dict[Way, str] = {}
        self.matmul_ms: dict[str, list[float]] = {}
        self._batch = draw_batch(task, world)
        self._teachers: dict[object, list[Teacher]] = {}  # shared by all ways that compute them alike

    def run(self, ways: Iterable[Way], rounds: int) -> dict[Way, Figures]:
        """Collective. Measure each way."""
        steps: dict[Way, OurStep | PortStep] = {}
        found: dict[Way, Figures] = {}
        for way in ways:
            if self.world.is_main:
                print(f"warms up {way}", file=sys.stderr, flush=True)
            try:
                steps[way], found[way] = self._warm_up(way)
            except ConfigError as error:
                self.refused[way] = str(error)
            except Exception as error:  # of memory, of a kernel: the other ways are measured all the same
                if self.world.world_size > 1:
                    raise  # the other ranks would wait for this one
                self.refused[way] = f"{type(error).__name__}: {one_line(error, 300)}"
        products: dict[str, Callable[[], Any]] = {
            precision: matrix_product(self.task.matmul_size, precision, self.device)
            for precision in dict.fromkeys(way.precision for way in found)
        }
        # With several ranks a figure is one call, so that all ranks make equally many.
        at_least_ms = 0.0 if self.world.world_size > 1 else 500.0 if self.device.type == "cuda" else 5.0
        named = {str(way): step for way, step in steps.items()}
        times = take_turns({**named, **products}, rounds, self.device, at_least_ms)
        self.matmul_ms = {precision: times[precision] for precision in products}
        for way, step in steps.items():
            found[way].times_ms = times[str(way)]
            self._look_inside(step, found[way], rounds)
        return found

    def _warm_up(self, way: Way) -> tuple[OurStep | PortStep, Figures]:
        """Build the step, and make three: the first compiles, the second has all state there, the third is watched."""
        prepared = prepare(self.task, way, self.world)
        teachers = [] if way.engine == PORT else self._load_teachers(prepared)
        before = allocated_bytes(self.device)
        step = self._build(way, prepared, teachers)
        first_s = seconds(step, self.device)
        step()
        figures = Figures(first_s, self._flops(prepared, way), None if way.engine == PORT else plan_mib(prepared, way))
        outside = sum(tensor.nbytes for each in teachers for tensor in tensors_of(each.network).values())
        self._watch(step, way, figures, before - (outside if way.teachers == "live" else 0))
        step.skipped = 0
        return step, figures

    def _build(self, way: Way, prepared: PreparedRun, teachers: Sequence[Teacher]) -> OurStep | PortStep:
        if way.engine == PORT:
            return PortStep(prepared, way.teachers == "live", self._batch)
        if way.teachers == "none":
            images = self._batch.images
            teachers = [dataclasses.replace(each, forward=recorded(each.forward, images)) for each in teachers]
        return OurStep(prepared, teachers, self._batch)

    def _load_teachers(self, prepared: PreparedRun) -> list[Teacher]:
        key = prepared.config.distill
        if key not in self._teachers:
            self._teachers[key] = freeze_teachers(prepared)
        return self._teachers[key]

    def _flops(self, prepared: PreparedRun, way: Way) -> float:
        """Three passes of the student, and one of each teacher. Involutions are not counted."""
        student, teachers = prepared.build_on_meta()
        advising = teachers if way.teachers == "live" else []
        size = self.task.image_size
        per_image = 3 * forward_flops(student, size) + sum(forward_flops(each, size) for each in advising)
        return self.task.batch_size * per_image

    def _watch(self, step: OurStep | PortStep, way: Way, figures: Figures, before: int) -> None:
        """Make a step, and note its operators and the peak of memory. before: bytes that are not the step's."""
        is_cuda, watch = self.device.type == "cuda", Watch()
        rest = allocated_bytes(self.device) - before
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
            figures.peak_mib = (torch.cuda.max_memory_allocated(self.device) - before) / MIB
        if not way.compiled:
            with watch:
                step(watch.mark)
            figures.operators = dict(watch.operators)
            if not is_cuda and way.engine not in RESIZE_STORAGES:
                figures.peak_mib = (rest + watch.peak) / MIB

    def _look_inside(self, step: OurStep | PortStep, figures: Figures, rounds: int) -> None:
        """Time the parts of a step and, on a GPU, the host. Apart from the turns, as it waits for the device."""
        clocks = [PartClock(self.device) for _ in range(rounds)]
        for clock in clocks:
            step(clock.mark)
            clock.mark(None)
        figures.parts_ms = {part: statistics.median(clock.times[part] for clock in clocks) for part in PARTS}
        if self.device.type == "cuda":
            step_ms = statistics.median(figures.times_ms)
            figures.host_share = statistics.median(enqueue_ms(step, self.device) for _ in range(rounds)) / step_ms
            figures.idle_share = idle_share(step, self.device, step_ms)
        figures.skipped = step.skipped


def plan_mib(prepared: PreparedRun, way: Way) -> float:
    """Without the batches of a pipeline, which is not here; on a CPU without what is assumed of a GPU."""
    memory = estimate_memory(prepared)
    rest = memory.batches + (memory.teachers if way.teachers == "none" else 0)
    rest += memory.workspace if prepared.world.device.type == "cpu" else 0
    return (memory.device - rest) / MIB


def matrix_product(size: int, precision: str, device: torch.device) -> Callable[[], Any]:
    """A product of two square matrices into memory that is there."""
    dtype = AUTOCAST.get(precision, torch.float32)
    left, right, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


# ---------------------------------------------------------------------------------------------------------------------
# In words


def derived(way: Way, found: Mapping[Way, Figures], bench: Bench) -> dict[str, Any]:
    """What follows from the figures of a way: images/s of all ranks, the port's time over its, shares of mm's rate and
    of the device's peak."""
    figures, images = found[way], bench.task.batch_size * bench.world.world_size
    flops_of_mm = 2 * bench.task.matmul_size**3
    port, peak = found.get(way.port), peak_flops(device_name(bench.device), way.precision)
    return {
        "images_per_s": [1e3 * images / each for each in figures.times_ms],
        "port_over_it": None if port is None else ratio(port.times_ms, figures.times_ms),
        "share_of_mm": ratio(bench.matmul_ms[way.precision], figures.times_ms) * figures.flops / flops_of_mm,
        "mfu": peak and figures.flops / (peak * statistics.median(figures.times_ms) / 1e3),
    }


def report(found: Mapping[Way, Figures], bench: Bench) -> str:
    """Two tables in Markdown, of whole steps and of their parts, and what could not be measured."""
    steps, parts = [], []
    for way, figures in found.items():
        more = derived(way, found, bench)
        steps.append(
            [
                str(way),
                spread(more["images_per_s"]),
                shown(more["port_over_it"], ".2f"),
                *(percent(each) for each in (more["share_of_mm"], more["mfu"])),
                *(percent(each) for each in (figures.idle_share, figures.host_share)),
                shown(figures.peak_mib, ".0f"),
                shown(figures.plan_mib, ".0f"),
                f"{figures.first_s:.1f}",
            ]
        )
        operators = [f" ({figures.operators.get(part, 0)})" if figures.operators else "" for part in PARTS]
        parts.append(
            [str(way), *(f"{figures.parts_ms[part]:.3g}{count}" for part, count in zip(PARTS, operators, strict=True))]
        )
    header = [
        "step",
        "images/s",
        "port / it",
        "of mm",
        "mfu",
        "idle",
        "host",
        "peak, MiB",
        "plan, MiB",
        "first step, s",
    ]
    notes = [f"{way}: {each.skipped} steps were skipped" for way, each in found.items() if each.skipped]
    notes += [f"{way}: not measured: {reason}" for way, reason in bench.refused.items()]
    if bench.device.type == "cpu":
        notes.append("mfu: n/a, as no peak of a CPU is known; idle, host: n/a, as a CPU is its own host")
    elif any(figures.idle_share is None for figures in found.values()):
        notes.append("idle: n/a, as the profiler has recorded no kernel (CUPTI is missing, or may not be used)")
    return "\n\n".join(
        [table(header, steps), "Milliseconds of each part (and its operators):", table(["step", *PARTS], parts), *notes]
    )


def percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.0f} %"


def shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def heading(bench: Bench, rounds: int) -> str:
    """Machine, task and the rate of matrix products."""
    task, capability = bench.task, torch.backends.cpu.get_cpu_capability()
    about = machine_text(bench.device) + (f", {capability}" if bench.device.type == "cpu" else "")
    networks = ", ".join([task.student.name, *(each.model for each in task.teachers.values())])
    rates = ", ".join(
        f"{2e-9 * task.matmul_size**3 / (statistics.median(each) / 1e3):.0f} GFLOP/s in {precision}"
        for precision, each in bench.matmul_ms.items()
    )
    return (
        f"{about}; {networks}, {bench.world.world_size} x {task.batch_size} images of {task.image_size} pixels, "
        f"{task.num_classes} classes; torch.mm of {task.matmul_size} x {task.matmul_size}: {rates}; median (minimum to "
        f"maximum) of {rounds} rounds in turns, after three steps to warm up"
    )


def as_json(found: Mapping[Way, Figures], bench: Bench, rounds: int) -> str:
    ways = [
        {**dataclasses.asdict(way), **dataclasses.asdict(figures), **derived(way, found, bench)}
        for way, figures in found.items()
    ]
    refused = [{**dataclasses.asdict(way), "reason": reason} for way, reason in bench.refused.items()]
    about = {"about": heading(bench, rounds), "task": dataclasses.asdict(bench.task), "matmul_ms": bench.matmul_ms}
    return json.dumps({**about, "ways": ways, "refused": refused}, indent=2) + "\n"


def one_or_more(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an argument that takes names with commas between them."""

    def names(text: str) -> list[str]:
        asked = text.split(",")
        unknown = [each for each in asked if each not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return asked

    return names


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", type=one_or_more(ENGINES), default=["plain"], help=f"of {', '.join(ENGINES)} (default: plain)")
    add("--precisions", type=one_or_more(PRECISIONS), default=["float32"], help=f"of {', '.join(PRECISIONS)}")
    add("--compile", choices=OFF_ON, default="both", help="default: both")
    add("--teachers", type=one_or_more(TEACHERS), default=["live"], help="live, none or live,none (default: live)")
    add("--student", default="cit_tiny_patch16_224", help="default: cit_tiny_patch16_224")
    add("--conv", default="regnety_006", help="the convolution teacher (default: regnety_006)")
    add("--inv", default="rednet26", help="the involution teacher (default: rednet26)")
    add("--image-size", type=positive, default=64, help="in pixels (default: 64)")
    add("--batch-size", type=positive, default=32, help="images of each rank (default: 32)")
    add("--classes", type=positive, default=1000, help="default: 1000")
    add("--repeats", type=positive, default=7, help="rounds to take the median of (default: 7)")
    add("--threads", type=positive, default=1, help="CPU threads (default: 1, the least noisy)")
    add("--deterministic", choices=OFF_ON, default="off", help="as engine.deterministic (default: off)")
    add("--json", type=output_file, metavar="FILE", help="write all figures to FILE")
    asked = parser.parse_args(argv)
    together = MixingConfig().group_size or 1
    if asked.batch_size % together:
        parser.error(f"--batch-size {asked.batch_size}: images are mixed {together} at a time; give a multiple of that")
    return asked


def ways_of(asked: argparse.Namespace) -> list[Way]:
    """The port for each kind of teachers, then every combination that was asked for."""
    ports = [Way(PORT, "float32", False, teachers) for teachers in asked.teachers]
    return ports + [
        Way(engine, precision, compiled, teachers, deterministic)
        for engine in asked.engines
        for precision in asked.precisions
        for compiled in OFF_ON[asked.compile]
        for deterministic in OFF_ON[asked.deterministic]
        for teachers in asked.teachers
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code."""
    asked = parse(argv)
    world, ways = World.from_env(os.environ), ways_of(asked)
    task = Task(
        student=StudentConfig(asked.student),
        teachers={"conv": TeacherConfig(asked.conv), "inv": TeacherConfig(asked.inv)},
        image_size=asked.image_size,
        batch_size=asked.batch_size,
        num_classes=asked.classes,
    )
    if asked.compile != "off":
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # or an eager step would be called compiled
    start(world)
    # Each step sets its own; this comes before the first matrix product.
    set_arithmetic(world.device, deterministic=any(way.deterministic for way in ways))
    try:
        torch.set_num_threads(asked.threads)
        bench = Bench(task, world)
        found = bench.run(ways, asked.repeats)
        if world.is_main:
            print(f"{heading(bench, asked.repeats)}\n\n{report(found, bench)}", flush=True)
            if asked.json:
                asked.json.write_text(as_json(found, bench, asked.repeats))
        return 0 if any(way.engine != PORT for way in found) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
