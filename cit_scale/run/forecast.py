"""How long a run will take on this machine, from some trial steps of each of its networks before training starts."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cit_scale.models.network import Network, Precision
from cit_scale.run.setup import PreparedRun
from cit_scale.settings import decided
from cit_scale.teachers import freeze

TRIALS = 3  # of each kind, after one that warms up; their median counts


@dataclass(frozen=True)
class Forecast:
    """Seconds of one run: in all, and until its first evaluation is done."""

    total_s: float
    first_evaluation_s: float


@dataclass(frozen=True)
class PartTimes:
    """Seconds for one micro-batch: until the next is there, the student's forward pass, the teachers', and the
    student's forward and backward pass.
    """

    data_s: float
    forward_s: float
    advice_s: float
    update_s: float

    def micro_step_s(self, device: torch.device) -> float:
        compute_s = self.update_s + self.advice_s
        # A CPU that computes does not decode at the same time.
        return compute_s + self.data_s if device.type == "cpu" else max(compute_s, self.data_s)


class Interrupted(Exception):  # noqa: N818  no error
    """The run is asked to stop: it need not be tried."""


def forecast(prepared: PreparedRun, asked_to_stop: Callable[[], bool]) -> Forecast:
    """Try the run's networks on one micro-batch of its data, and count its steps and evaluations. Raises Interrupted.

    Start, compilation and checkpoints are left out.
    """
    config, split = prepared.config, prepared.batch_split
    parts = time_parts(prepared, asked_to_stop)
    epoch_s = prepared.steps_per_epoch * split.micro_steps * parts.micro_step_s(prepared.world.device)
    batches_of_evaluation = -(-len(prepared.eval_set) // (split.micro_batch_size * prepared.world.world_size))
    networks = 1 if config.optim.ema_decay is None else 2
    evaluation_s = networks * batches_of_evaluation * (parts.forward_s + parts.data_s)
    teachers_s = batches_of_evaluation * (parts.advice_s + parts.data_s) if config.teachers else 0.0
    evaluations = -(-config.train.epochs // config.train.eval_every_epochs)
    return Forecast(
        total_s=teachers_s + config.train.epochs * epoch_s + evaluations * evaluation_s,
        first_evaluation_s=teachers_s
        + min(config.train.eval_every_epochs, config.train.epochs) * epoch_s
        + evaluation_s,
    )


def time_parts(prepared: PreparedRun, asked_to_stop: Callable[[], bool]) -> PartTimes:
    """Try the run's networks, with any weights, on one micro-batch of its data. Raises Interrupted.

    On each rank by itself, as under engine.name=plain: what ranks say to one another is left out. Neither compiled
    nor with activation checkpointing.
    """
    config, device = prepared.config, prepared.world.device
    median_s = partial(_median_s, device=device, asked_to_stop=asked_to_stop)
    with contextlib.closing(prepared.train_batches(0)) as batches:
        images = next(batches).images
        data_s = median_s(lambda: next(batches))
    network = prepared.build_student().to(device).train()
    network.precision = decided(config.engine.precision)
    teachers = [prepared.build_teacher_without_weights(teacher) for teacher in config.teachers.values()]
    precision: Precision = decided(config.distill.teacher_precision)
    frozen = [freeze(each, images.shape[-1], device, precision=precision, compile=False) for each in teachers]

    return PartTimes(
        data_s=data_s,
        forward_s=median_s(lambda: _forward(network, images)),
        advice_s=median_s(lambda: [teacher(images) for teacher in frozen]),
        update_s=median_s(lambda: _update(network, images)),
    )


def forecast_lines(prepared: PreparedRun, asked_to_stop: Callable[[], bool]) -> list[str]:
    """What to say of the run and of the teachers' runs in it, in the order in which they are trained. Nothing once the
    run is asked to stop.
    """
    runs = {f"teacher {name}": run for name, run in prepared.teacher_runs.items()} | {"the student": prepared}
    try:
        forecasts = {name: forecast(run, asked_to_stop) for name, run in runs.items()}
    except Interrupted:
        return []
    except Exception as error:  # of memory, of a kernel: no figure is worth a run
        return [f"how long the run takes is not known: {type(error).__name__} in a trial step"]
    finally:
        if prepared.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(prepared.world.device)
    total_s = sum(each.total_s for each in forecasts.values())
    parts = ", ".join(f"{name} {shown_s(each.total_s)}" for name, each in forecasts.items())
    first = next(iter(forecasts.values())).first_evaluation_s
    return [
        f"takes about {shown_s(total_s)} on this machine ({parts}), by {TRIALS} trial steps; "
        f"the first evaluation comes after about {shown_s(first)}"
    ]


def shown_s(seconds: float) -> str:
    """A duration in words, to two figures or so."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))
    unit, length = next((each for each in units if seconds >= 2 * each[1]), ("s", 1.0))
    value = seconds / length
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def _forward(network: Network, images: torch.Tensor) -> None:
    network.eval()
    with torch.no_grad():
        network(images)
    network.train()


def _update(network: Network, images: torch.Tensor) -> None:
    sum(logits.square().mean() for logits in network(images)).backward()
    network.zero_grad()


def _median_s(function: Callable[[], object], device: torch.device, asked_to_stop: Callable[[], bool]) -> float:
    times: list[float] = []
    for _ in range(TRIALS + 1):
        if asked_to_stop():
            raise Interrupted
        times.append(_timed_s(function, device))
    return statistics.median(times[1:])


def _timed_s(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
