"""The steps that ``bench.step`` times: the trainer's own over a prepared run without images, and the plain port's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cit_scale.batch import Batch
from cit_scale.bench.plain_port import LR, PlainPort, plain_teacher
from cit_scale.config import (
    DataConfig,
    DistillConfig,
    EngineConfig,
    MixingConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import build_engine
from cit_scale.errors import ConfigError
from cit_scale.models.arithmetic import set_arithmetic
from cit_scale.models.network import Network, Precision
from cit_scale.run.progress import seed_step
from cit_scale.run.setup import PreparedRun, check_settings, slow_precisions
from cit_scale.teachers import Teacher, frozen_teacher
from cit_scale.train import train_step

PORT = "port"
ENGINES = ("plain", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
COMPILE_TEACHERS_ALONE = ("zero3", "zero3_offload")  # check_settings refuses to compile the student there
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16", "fp16")
TEACHERS = ("live", "none")

Mark = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What a step computes. batch_size: images of each rank. matmul_size: rows of the matrices that are multiplied.

    micro_steps: in which a rank takes its images.
    """

    student: StudentConfig
    teachers: dict[str, TeacherConfig]
    image_size: int
    batch_size: int
    num_classes: int
    mixing: MixingConfig = MixingConfig()  # noqa: RUF009  frozen
    matmul_size: int = 2048
    micro_steps: int = 1


@dataclass(frozen=True)
class Way:
    """How a step is computed. engine: of ENGINES, or PORT. teachers: of TEACHERS."""

    engine: str
    precision: Precision
    compiled: bool
    teachers: str
    deterministic: bool = False

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        how += ", deterministic" if self.deterministic else ""
        return f"{self.engine}, {self.precision}, {how}, teachers {self.teachers}"

    @property
    def port(self) -> Way:
        """The port's step to compare with."""
        return Way(PORT, "float32", False, self.teachers)


# ---------------------------------------------------------------------------------------------------------------------
# The steps


class LabelsAlone:
    """A ``Source`` of so many classes, without images: what a prepared run asks of its data before it reads any."""

    def __init__(self, num_classes: int, num_images: int, size: tuple[int, int] = (64, 64)) -> None:
        """size: height and width of the images."""
        self.classes = tuple(f"class {number}" for number in range(num_classes))
        self.labels = np.arange(num_images) % num_classes
        self.heights, self.widths = (np.full(num_images, side) for side in size)
        self.rejects: Mapping[int, str] = {}
        self.notes: tuple[str, ...] = ()
        self.fingerprint = ""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        raise OSError("there are no images")

    def key(self, index: int) -> bytes:
        return str(index).encode()

    def name(self, index: int) -> str:
        return str(index)

    def stamps(self) -> np.ndarray:
        return np.zeros((len(self), 3), np.int64)


def prepare(task: Task, way: Way, world: World) -> PreparedRun:
    """The run whose step ``way`` computes. Raises ConfigError, also for a precision that is slow on this device."""
    images = task.batch_size * world.world_size
    is_zero = way.engine.startswith("zero")
    # The port builds no engine; plain would refuse to run on several ranks.
    engine = "zero" if is_zero else "fsdp2" if way.engine == PORT else way.engine
    config = RunConfig(
        student=task.student,
        teachers=task.teachers,
        data=DataConfig(image_size=task.image_size),
        mixing=task.mixing,
        distill=DistillConfig(teacher_precision="bf16" if way.precision == "bf16" else "float32", compile=way.compiled),
        optim=OptimConfig(lr_batch_size=images),
        engine=EngineConfig(
            name=cast(Any, engine),
            precision=way.precision,
            compile=way.compiled and way.engine not in COMPILE_TEACHERS_ALONE,
            ds_config=way.engine if is_zero else "zero1",
            deterministic=way.deterministic,
        ),
        train=TrainConfig(global_batch_size=images, micro_batch_size=task.batch_size // task.micro_steps),
    )
    slow = slow_precisions(config, world.device)
    if slow:
        raise ConfigError(slow[0])
    setup = check_settings(config, world, same_run=False)
    reader = Reader(LabelsAlone(task.num_classes, max(images, task.num_classes)))
    return PreparedRun(config, setup, reader, reader, {})


def draw_batch(task: Task, world: World) -> Batch:
    """This rank's images, of noise, on the device."""
    generator = torch.Generator().manual_seed(world.rank)
    images = torch.rand(task.batch_size, 3, task.image_size, task.image_size, generator=generator)
    labels = torch.randint(task.num_classes, (task.batch_size,), generator=generator)
    samples = world.rank * task.batch_size + torch.arange(task.batch_size)
    return Batch(images.to(world.device), labels.to(world.device), samples, samples)


def build_teachers(prepared: PreparedRun) -> dict[str, Network]:
    """By name, with the same random weights each time."""
    built = {}
    for name, teacher in prepared.config.teachers.items():
        torch.manual_seed(1)
        built[name] = network = prepared.build_teacher_without_weights(teacher)
        for layer in network.modules():
            # New networks begin with branches that multiply by zero, which would hide what the branches compute.
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.constant_(layer.weight, 0.5)
    return built


def freeze_teachers(prepared: PreparedRun) -> list[Teacher]:
    """The teachers as a run loads them, but for their weights."""
    config, device = prepared.config, prepared.world.device
    return [
        frozen_teacher(name, network, config.distill, config.data.image_size, device)
        for name, network in build_teachers(prepared).items()
    ]


def recorded(forward: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """A teacher that says of any images what it says of these."""
    logits = forward(images)
    return lambda images: logits


def ignore(part: str) -> None:
    """A mark that nobody takes note of."""


class MarkedEngine:
    """An engine that says when a part of the step begins."""

    def __init__(self, engine: Engine, mark: Mark) -> None:
        self._engine, self._mark = engine, mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, images: Tensor) -> Any:
        self._mark("student")
        logits = self._engine.forward(images)
        self._mark("loss")
        return logits

    def backward(self, loss: Tensor) -> None:
        self._mark("backward")
        self._engine.backward(loss)

    def step(self, lr: float) -> Any:
        self._mark("update")
        return self._engine.step(lr)


class OurStep:
    """``train_step`` over micro-batches that lie on the device, again and again.

    last: what the last step did. skipped: steps before it without an update.
    """

    def __init__(self, prepared: PreparedRun, teachers: Sequence[Teacher], *batches: Batch) -> None:
        self._prepared, self._teachers = prepared, teachers
        self._batches = itertools.cycle(batches)
        self.engine = build_engine(prepared.build_student(), prepared.engine_setup)
        self.engine.module.train()
        self._step = 0
        self.last: StepResult | None = None
        self.skipped = 0

    def __call__(self, mark: Mark = ignore) -> None:
        config, world = self._prepared.config, self._prepared.world
        set_arithmetic(world.device, deterministic=config.engine.deterministic)  # of this way, not of the one before
        mark("mix")
        seed_step(config.seed, self._step, world.rank)
        engine = cast(Engine, MarkedEngine(self.engine, mark))
        teachers = [dataclasses.replace(each, forward=marked(each.forward, mark)) for each in self._teachers]
        trained = train_step(engine, teachers, self._batches, self._prepared, self._step, LR)
        # Read one step late, as the training loop does: by then the device has it.
        if self.last is not None:
            self.skipped += self.last.skipped
        self.last = trained.result
        self._step += 1


def marked(forward: Callable[[Tensor], Tensor], mark: Mark) -> Callable[[Tensor], Tensor]:
    def marked_forward(images: Tensor) -> Tensor:
        mark("teachers")
        return forward(images)

    return marked_forward


class PortStep:
    """The step of the plain port over the same images."""

    skipped = 0

    def __init__(self, prepared: PreparedRun, are_live: bool, batch: Batch) -> None:
        self._device = device = prepared.world.device
        self._batch = batch
        teachers = {name: plain_teacher(each, device) for name, each in build_teachers(prepared).items()}
        if not are_live:
            teachers = {name: recorded(each, batch.images) for name, each in teachers.items()}
        self.port = PlainPort(prepared.build_student(), teachers, prepared.num_classes, device)

    def __call__(self, mark: Mark = ignore) -> None:
        set_arithmetic(self._device)
        self.port.step(self._batch.images, self._batch.labels, mark)
