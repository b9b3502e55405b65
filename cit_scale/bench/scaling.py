"""What one GPU, eight and sixty-four do, by arithmetic: images/s, hours, GiB and gigabytes. Nothing is measured.

python -m cit_scale.bench.scaling
python -m cit_scale.bench.scaling --gpu A100 --reached 0.3 --gpus 1 4 --students cit_small_patch16_224
python -m cit_scale.bench.scaling --batch 4096 --gpus 8 32 --node_link 300 --network_link 25

Counted: floating-point operations (run/flops.py), parameters, and memory (the plan of
launchers/submit.py --dry-run, at ZeRO stage 1). Assumed: what the options say; replace them by your
own figures. The defaults make the tables of docs/scaling.md, which says where they come from.

A step takes the longer of what the GPU computes and what the host queues, and then the reduction of
the gradients. Live teachers are computed in each step. Recorded ones, whose logits are read from a
disk instead, are no way that the trainer has yet. GB are 1e9 bytes, GiB 2**30.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, get_type_hints

from cit_scale.bench.measure import table
from cit_scale.bench.step_ways import LabelsAlone
from cit_scale.config import (
    DataConfig,
    DistillConfig,
    EngineConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from cit_scale.data.order import steps_per_epoch
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, error_line
from cit_scale.models.network import Network
from cit_scale.run.flops import PEAK_FLOPS, forward_flops, peak_flops
from cit_scale.run.plan import FLOAT32_BYTES, GIB, WORKSPACE, batch_bytes, network_memory
from cit_scale.run.setup import PreparedRun, check_settings
from cit_scale.text import positive

TEACHERS = {"conv": "regnety_040", "inv": "rednet101"}  # of the recipes cit_*
STUDENTS = ("cit_tiny_patch16_224", "cit_small_patch16_224", "cit_base_patch16_224")
LIVE, RECORDED = "live", "recorded"
FP16_BYTES = 2
INDEX_BYTES = 2  # of a class among up to 65,536
GB = 10**9
WHAT = "what"


def assumed(default: Any, what: str) -> Any:
    """A field that is an option. what: its help."""
    return field(default=default, metadata={WHAT: what})


@dataclass(frozen=True)
class Inputs:
    """What the figures follow from. Each is an option; docs/scaling.md says where the defaults come from."""

    gpu: str = assumed("H100", "a name in run/flops.py, for its peak in bf16")
    reached: float = assumed(0.2, "share of the peak that is reached")
    node_link: float = assumed(450.0, "GB/s from a GPU to another of its node")
    network_link: float = assumed(50.0, "GB/s for each GPU between nodes")
    node_gpus: int = assumed(8, "GPUs of a node")
    host_ms: float = assumed(10.0, "ms in which the host queues a micro-step")
    data: float = assumed(2500.0, "images/s that its data stream gives a GPU")
    images: int = assumed(1_281_167, "of an epoch; ImageNet's")
    height: int = assumed(375, "pixels, as the images lie on the disk")
    width: int = assumed(500, "the same")
    classes: int = assumed(1000, "ImageNet's")
    batch: int = assumed(1024, "images of an update")
    micro_batch: int = assumed(128, "images of a forward pass at most")
    epochs: int = assumed(300, "the paper's")
    image_size: int = assumed(224, "pixels that networks see")


class Counted(NamedTuple):
    """What networks take. forward, teachers: FLOP of an image's forward pass. parameters: the student's."""

    parameters: int
    forward: int
    teachers: int

    def of_image(self, kind: str) -> int:
        """FLOP of a training image: three passes of the student, and one of each live teacher."""
        return 3 * self.forward + (self.teachers if kind == LIVE else 0)

    @property
    def gradient_bytes(self) -> int:
        return FLOAT32_BYTES * self.parameters


class Step(NamedTuple):
    """Of one update, in ms. arithmetic, host: of all micro-steps; reduction: of the gradients, behind them."""

    micro_batch: int
    micro_steps: int
    arithmetic: float
    host: float
    reduction: float

    @property
    def ms(self) -> float:
        return max(self.arithmetic, self.host) + self.reduction


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def prepared_run(student: str, gpus: int, inputs: Inputs) -> PreparedRun:
    """The run of a recipe cit_*, on so many ranks, without images. Raises ConfigError."""
    config = RunConfig(
        student=StudentConfig(student),
        teachers={name: TeacherConfig(model) for name, model in TEACHERS.items()},
        data=DataConfig(image_size=inputs.image_size),
        optim=OptimConfig(warmup_epochs=min(OptimConfig.warmup_epochs, inputs.epochs)),
        engine=EngineConfig(precision="bf16", compile=False),
        distill=DistillConfig(teacher_precision="bf16", compile=False),
        train=TrainConfig(
            epochs=inputs.epochs, global_batch_size=inputs.batch, micro_batch_size=min(inputs.micro_batch, inputs.batch)
        ),
    )
    setup = check_settings(config, World(world_size=gpus, local_world_size=min(gpus, inputs.node_gpus)), same_run=False)
    source = LabelsAlone(inputs.classes, inputs.images, (inputs.height, inputs.width))
    reader = Reader(source)
    return PreparedRun(config, setup, reader, reader, {})


def count(student: str, inputs: Inputs) -> Counted:
    network, teachers = prepared_run(student, 1, inputs).build_on_meta()
    forward, *of_teachers = (forward_flops(each, inputs.image_size) for each in (network, *teachers))
    return Counted(sum(parameter.numel() for parameter in network.parameters()), forward, sum(of_teachers))


def memory_bytes(prepared: PreparedRun, kind: str, inputs: Inputs) -> int:
    """Of a rank, as ``run.plan.estimate_memory`` has it; of recorded teachers the logits alone."""
    network, teachers = prepared.build_on_meta()
    teachers = teachers if kind == LIVE else list[Network]()
    for teacher in teachers:
        teacher.precision = "bf16"
    memory = network_memory(network, teachers, prepared.engine_setup, inputs.image_size, inputs.classes)
    return memory.device + batch_bytes(prepared) + WORKSPACE


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def step(counted: Counted, kind: str, gpus: int, micro_batch: int, micro_steps: int, inputs: Inputs) -> Step:
    """An update on each of so many GPUs."""
    peak = peak_flops(inputs.gpu, "bf16")
    assert peak is not None  # ``main`` has asked
    arithmetic = 1e3 * micro_batch * micro_steps * counted.of_image(kind) / (peak * inputs.reached)
    return Step(micro_batch, micro_steps, arithmetic, inputs.host_ms * micro_steps, reduction_ms(counted, gpus, inputs))


def reduction_ms(counted: Counted, gpus: int, inputs: Inputs) -> float:
    """In a ring each GPU sends 2 (n - 1) / n times the gradients, over the slowest link on the way."""
    link = inputs.node_link if gpus <= inputs.node_gpus else inputs.network_link
    return 1e3 * 2 * (gpus - 1) / gpus * counted.gradient_bytes / (link * GB)


def hours(images_per_s: float, inputs: Inputs) -> float:
    """Of all updates, and nothing else."""
    return inputs.epochs * steps_per_epoch(inputs.images, inputs.batch) * inputs.batch / images_per_s / 3600


def recorded_bytes(views: int, inputs: Inputs, most: int | None = None) -> int:
    """On the disk, of all teachers. views: of each image. most: how many of the likeliest classes are kept of a view,
    with their numbers; None: all, in their order."""
    of_view = inputs.classes * FP16_BYTES if most is None else most * (FP16_BYTES + INDEX_BYTES)
    return inputs.images * views * len(TEACHERS) * of_view


# ---------------------------------------------------------------------------------------------------------------------
# In words


def networks_table(counted: Mapping[str, Counted]) -> str:
    of_image = [f"an image, {kind}, GFLOP" for kind in (LIVE, RECORDED)]
    header = ["student", "parameters", "forward, GFLOP", *of_image, "gradients in float32, MB"]
    return table(
        header,
        (
            [
                name,
                f"{each.parameters / 1e6:.1f} M",
                f"{each.forward / 1e9:.1f}",
                *(f"{each.of_image(kind) / 1e9:.0f}" for kind in (LIVE, RECORDED)),
                f"{each.gradient_bytes / 1e6:.0f}",
            ]
            for name, each in counted.items()
        ),
    )


def time_table(counted: Mapping[str, Counted], gpus: Sequence[int], inputs: Inputs) -> str:
    header = ["student, teachers, GPUs", "an update of a GPU", "arithmetic, ms", "host, ms", "reduction, ms"]
    header += ["images/s", "hours", f"images/s, {inputs.data:,.0f} a GPU", "hours"]
    rows = []
    for name, kind, number in combinations(counted, gpus):
        split = prepared_run(name, number, inputs).batch_split
        one = step(counted[name], kind, number, split.micro_batch_size, split.micro_steps, inputs)
        speed = 1e3 * inputs.batch / one.ms
        fed = min(speed, inputs.data * number)
        rows.append(
            [
                f"{name}, {kind}, {number}",
                f"{one.micro_steps} x {one.micro_batch}",
                *map(two_digits, (one.arithmetic, one.host, one.reduction)),
                *map(two_digits, (speed, hours(speed, inputs), fed, hours(fed, inputs))),
            ]
        )
    return table(header, rows)


def memory_table(students: Sequence[str], gpus: Sequence[int], inputs: Inputs) -> str:
    """A row for each kind of teachers, a column for each number of GPUs."""
    header = ["student, teachers", *(f"{number} GPU{'s' * (number > 1)}" for number in gpus)]
    rows = [
        [
            f"{name}, {kind}",
            *(f"{memory_bytes(prepared_run(name, number, inputs), kind, inputs) / GIB:.1f}" for number in gpus),
        ]
        for name in students
        for kind in (LIVE, RECORDED)
    ]
    return table(header, rows)


def disk_table(inputs: Inputs) -> str:
    best = [most for most in (50, 10) if most < inputs.classes]
    header = ["views of an image", f"all {inputs.classes:,} classes, GB", *(f"the best {most}, GB" for most in best)]
    rows = [
        [str(views), *(two_digits(recorded_bytes(views, inputs, most) / GB) for most in (None, *best))]
        for views in sorted({1, 50, inputs.epochs})
    ]
    return table(header, rows)


def combinations(students: Iterable[str], gpus: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    for name in students:
        for kind in (LIVE, RECORDED):
            for number in gpus:
                yield name, kind, number


def two_digits(value: float) -> str:
    """The assumptions are no better."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 9.95 else f"{value:.2g}"


def inputs_text(inputs: Inputs) -> str:
    """All of them, by their options."""
    return " ".join(f"--{each.name} {getattr(inputs, each.name)}" for each in fields(inputs))


def above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def known_gpu(text: str) -> str:
    if peak_flops(text, "bf16") is None:
        known = ", ".join(pattern.removesuffix(r"\b") for pattern in PEAK_FLOPS)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return text


def parse(argv: Sequence[str] | None) -> tuple[Inputs, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), metavar="NAME", help="default: the recipes'")
    parser.add_argument("--gpus", nargs="+", type=positive, default=[1, 8, 64], metavar="N", help="default: 1 8 64")
    parser.add_argument("--memory", choices=("on", "off"), default="on", help="the plan's; off saves half a minute")
    types = {int: positive, float: above_0, str: known_gpu}
    hints = get_type_hints(Inputs)
    for each in fields(Inputs):
        about: dict[str, Any] = {"default": each.default, "help": f"{each.metadata[WHAT]} (default: {each.default})"}
        parser.add_argument(f"--{each.name}", type=types[hints[each.name]], metavar="X", **about)
    asked = parser.parse_args(argv)
    if asked.reached > 1:
        parser.error(f"--reached {asked.reached:g} is more than the whole peak; give a share above 0, at most 1")
    return Inputs(**{each.name: getattr(asked, each.name) for each in fields(Inputs)}), asked


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Returns the exit code."""
    inputs, asked = parse(argv)
    try:
        counted = {name: count(name, inputs) for name in asked.students}
        parts = [
            f"Arithmetic, nothing was run: {inputs_text(inputs)}",
            networks_table(counted),
            time_table(counted, asked.gpus, inputs),
            *([memory_table(asked.students, asked.gpus, inputs)] if asked.memory == "on" else []),
            disk_table(inputs),
        ]
    except (ConfigError, ValueError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
