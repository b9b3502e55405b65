"""The way in: ``deepspeed cit_scale/train.py``, ``torchrun cit_scale/train.py`` or ``python cit_scale/train.py``.

main -> run (teachers first) -> train -> train_step -> engine.step.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python looks for imports beside this file; the package stands one folder higher.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cit_scale import checkpoint, cli
from cit_scale.bad_images import BadImages, TooManyBadImagesError
from cit_scale.batch import Batch, LossTerms
from cit_scale.config import RunConfig, TeacherConfig
from cit_scale.data.encoded import BadImageError
from cit_scale.data.mixing import mix
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import build_engine
from cit_scale.errors import ConfigError, Stopped
from cit_scale.evaluate import evaluate
from cit_scale.files import write_text
from cit_scale.lock import exclusive
from cit_scale.losses import co_advise_loss
from cit_scale.metrics import RunLog, RunningMeans, StepClock
from cit_scale.models.network import load_weights
from cit_scale.optim import learning_rate
from cit_scale.results import describe_environment, print_table
from cit_scale.stop import StopRequest
from cit_scale.task import CONFIG, Task, check, check_same_run, teacher_runs
from cit_scale.teachers import Teacher, run_teachers
from cit_scale.world import World, agree_any, barrier, broadcast, start, together

WEIGHTS = "model.safetensors"
RESULTS = "results.json"
ENVIRONMENT = "env.json"

# What a finished run leaves for use: where it lies in the engine's state, and the file it becomes.
EXPORTS = {"student": ("weight/", WEIGHTS), "student ema": ("ema/", "model_ema.safetensors")}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report.

    Returns the exit code: 0, 2 for a mistake of the user's, 1 for a file that cannot be read or written or too many bad
    images, 128 + signal when asked to stop.
    """
    is_main = True
    try:
        world = join_world(os.environ)
        is_main = world.is_main
        # Every rank parses; --help and --print_config are for one reader.
        with contextlib.nullcontext() if is_main else contextlib.redirect_stdout(io.StringIO()):
            arguments = cli.parse_arguments(sys.argv[1:] if argv is None else argv)
        if arguments.local_rank not in (None, world.local_rank):
            raise ConfigError(
                f"--local_rank={arguments.local_rank}, but the environment says {world.local_rank}; "
                "leave the flag to the launcher"
            )
        start(world)
        with StopRequest() as stop:
            results = run(arguments.config, world, stop, resume=arguments.resume)
    except ConfigError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except TooManyBadImagesError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except (BadImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # on the rank that met it
        return 1
    except Stopped as stopped:
        if is_main:
            print(f"{stopped}; the same command continues there", flush=True)
        return 128 + (stopped.signum or 0)
    if is_main:
        print_table(arguments.config.run_dir, results)
    return 0


def join_world(env: Mapping[str, str]) -> World:
    """The world that the launcher's environment describes, or a ConfigError."""
    try:
        world = World.from_env(env)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if world.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise ConfigError(
            f"there are {world.world_size} ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "start with deepspeed or torchrun, or set both"
        )
    return world


def run(config: RunConfig, world: World, stop: StopRequest, *, resume: bool = True) -> dict[str, Any]:
    """Collective. Train the teachers that have no weights yet, then the student. Returns the student's results.

    resume: go on with what stands in the run folder; otherwise set it aside.
    """
    task = check(config, world, resume=resume)
    first = teacher_runs(config)
    with exclusive(config.run_dir, world, stop):
        if not resume:
            set_aside(config.run_dir, world)
        # Again, now that no other job can write there.
        together(world, lambda: [check_same_run(each) for each in (config, *first.values())])
        teachers = dict(config.teachers)
        for name, teacher_config in first.items():
            train(dataclasses.replace(task, config=teacher_config), {}, stop)
            teachers[name] = dataclasses.replace(teachers[name], weights=str(teacher_config.run_dir / WEIGHTS))
        return train(task, teachers, stop)


def set_aside(run_dir: Path, world: World) -> None:
    """Collective. Move what stands in the run folder to run_dir.1 (or .2, ...), so that nothing is lost."""
    if world.is_main and run_dir.exists():
        aside = next(
            path for i in itertools.count(1) if not (path := run_dir.with_name(f"{run_dir.name}.{i}")).exists()
        )
        run_dir.rename(aside)
        print(f"{run_dir} set aside as {aside}", flush=True)
    barrier(world)


def train(task: Task, teachers: Mapping[str, TeacherConfig], stop: StopRequest) -> dict[str, Any]:
    """Collective. Train the student with frozen ``teachers``, which have weights, from where the run folder stands.

    A finished run is left as it is. Raises Stopped, with everything saved, when ``stop`` is requested on any rank.
    """
    config, world, run_dir = task.config, task.world, task.config.run_dir
    results = run_dir / RESULTS
    finished = broadcast(world, json.loads(results.read_text()) if world.is_main and results.exists() else None)
    if finished is not None:
        return finished
    advisers = [task.load_teacher(name, teacher) for name, teacher in teachers.items()]
    engine = build_engine(task.build_student(), config, world, task.batch_plan.micro_steps)

    # What the numbers in a checkpoint depend on and the configuration does not show.
    inputs = {"data": task.train_set.fingerprint, **{f"teacher {adviser.name}": adviser.sha256 for adviser in advisers}}
    step = resume(engine, run_dir, inputs, world)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / CONFIG, cli.to_yaml(config))
        add_start(run_dir / ENVIRONMENT, {"step": step, **describe_environment(world)})
    log = RunLog(run_dir, world, title=config.name, step=step, total_steps=task.total_steps)
    try:
        plan = task.batch_plan
        start_of_run = f"continues after step {step}" if step else f"starts in {run_dir}"
        cut = f"{world.world_size} ranks x {plan.micro_steps} micro-steps x {plan.micro_batch_size} images"
        log.say(f"{start_of_run}; an update is {cut}")
        bad = BadImages(run_dir, (task.train_images, task.eval_images), config.data.max_bad_images, world)
        images_per_s = train_steps(task, engine, advisers, inputs, step, log, bad, stop)
        results = finish(task, engine, advisers, teachers, images_per_s)
        bad.collect(log.say)
        return results
    finally:
        log.close()


def add_start(path: Path, start: Mapping[str, Any]) -> None:
    """Add one start of the run to the list of them in a JSON file."""
    starts = json.loads(path.read_text()) if path.exists() else []
    write_text(path, json.dumps([*starts, start], indent=2) + "\n")


def resume(engine: Engine, run_dir: Path, inputs: Mapping[str, str], world: World) -> int:
    """Collective. Load the newest good checkpoint. Returns the step it was taken after, 0 where there is none."""
    found = checkpoint.load_newest(run_dir, world)
    if found is None:
        return 0
    changed = [name for name in inputs if found.meta.get(name) != inputs[name]]
    if changed:
        raise ConfigError(
            f"the {' and the '.join(changed)} of {run_dir} changed since step {found.step}; "
            f"bring back what it was trained with, or start anew with --no-resume"
        )
    engine.load_state(found.tensors)
    return found.step


def train_steps(
    task: Task,
    engine: Engine,
    teachers: Sequence[Teacher],
    inputs: Mapping[str, str],
    step: int,
    log: RunLog,
    bad: BadImages,
    stop: StopRequest,
) -> float | None:
    """Collective. From ``step`` to the last, with logs, evaluations, checkpoints. Returns images/s of the whole job."""
    config, world = task.config, task.world
    batches = task.train_batches(step)
    means, clock = RunningMeans(), StepClock()
    engine.module.train()
    while step < task.total_steps:
        clock.start()
        lr = learning_rate(step, config.optim, config.peak_lr, task.steps_per_epoch, config.train.epochs)
        seed_step(config.seed, step, world.rank)
        terms, result = train_step(engine, teachers, batches, task, step, lr)
        step += 1
        for term in terms:
            means.add({"loss": term.total, "loss_label": term.label, **_named("loss_", term.advice)})
        clock.stop()

        is_last = step == task.total_steps
        stopping, bad_images_met = agree_any(world, stop.requested, bad.has_news)
        log.advance(step)
        if bad_images_met:
            bad.collect(log.say)
        if result.skipped:
            log.say(f"step {step} was skipped: the gradient is not finite")
        if is_last or stopping or step % config.train.log_every_steps == 0:
            speed = clock.images_per_s(config.train.global_batch_size)
            log.record(step, {**means.drain(world), "lr": lr, "grad_norm": result.grad_norm, "images_per_s": speed})
        if not is_last and step % (config.train.eval_every_epochs * task.steps_per_epoch) == 0:
            engine.module.eval()
            accuracy = evaluate(engine.forward, task.eval_batches(), world)
            engine.module.train()
            log.record(step, _named("top1_", accuracy.top1))
        if is_last or stopping or bad.too_many or step % config.train.save_every_steps == 0:
            checkpoint.save(config.run_dir, step, engine.state(), inputs, world, keep=config.train.keep_last)
        bad.refuse_too_many()
        if stopping:
            raise Stopped(step, stop.signum)
    return clock.images_per_s(config.train.global_batch_size)


def train_step(
    engine: Engine, teachers: Sequence[Teacher], batches: Iterator[Batch], task: Task, step: int, lr: float
) -> tuple[list[LossTerms], StepResult]:
    """Collective. One update from the next global batch. Returns the loss terms of each micro-step and the outcome."""
    config = task.config
    weights = {name: teacher.weight for name, teacher in config.teachers.items()}
    terms = []
    for _ in range(engine.micro_steps):
        mixed = mix(next(batches), config.mixing, task.num_classes, seed=config.seed, step=step)
        advice = run_teachers(teachers, mixed.images)
        logits = engine.forward(mixed.images)
        terms.append(
            co_advise_loss(logits, advice, mixed.targets, temperature=config.distill.temperature, weights=weights)
        )
        engine.backward(terms[-1].total)
    return terms, engine.step(lr)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make drop path and dropout a function of the step, so that no generator's state has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def finish(
    task: Task,
    engine: Engine,
    advisers: Sequence[Teacher],
    teachers: Mapping[str, TeacherConfig],
    images_per_s: float | None,
) -> dict[str, Any]:
    """Collective. Write the weights, evaluate what was written and the teachers, close the run with its results."""
    config, world, run_dir = task.config, task.world, task.config.run_dir
    state = engine.state()
    files = broadcast(world, export_weights(state, run_dir) if world.is_main else None)
    accuracy = {}
    for name, file in files.items():
        network = task.build_student()
        load_weights(network, run_dir / file)
        network.eval().to(world.device)
        accuracy[name] = evaluate(network, task.eval_batches(), world)
    results = {
        "model": config.student.name,
        "steps": task.total_steps,
        "images_per_s": images_per_s,
        "eval_images": next(iter(accuracy.values())).images,
        "accuracy": {name: {"top1": found.top1, "top5": found.top5} for name, found in accuracy.items()},
        "teachers": {},
    }
    if advisers:
        measured = evaluate(lambda images: run_teachers(advisers, images), task.eval_batches(), world)
        results["teachers"] = {
            adviser.name: {
                "model": teachers[adviser.name].model,
                "sha256": adviser.sha256,
                "top1": measured.top1[adviser.name],
                "top5": measured.top5[adviser.name],
            }
            for adviser in advisers
        }
    if world.is_main:
        write_text(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def export_weights(state: Mapping[str, Tensor], run_dir: Path) -> dict[str, str]:
    """Write the student, and its moving average where there is one, as timm state dicts. Returns file names by kind."""
    buffers = _without_prefix(state, "buffer/model.")
    files = {}
    for kind, (prefix, file) in EXPORTS.items():
        weights = _without_prefix(state, f"{prefix}model.")
        if weights:
            partial = run_dir / f"{file}.partial"
            checkpoint.write_tensors({**buffers, **weights}, partial)
            partial.replace(run_dir / file)
            files[kind] = file
    return files


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.contiguous() for key, value in state.items() if key.startswith(prefix)}


if __name__ == "__main__":
    raise SystemExit(main())
