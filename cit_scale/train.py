"""The way in: ``deepspeed cit_scale/train.py``, ``torchrun cit_scale/train.py`` or ``python cit_scale/train.py``.

main -> run (teachers first) -> train -> train_step -> engine.step.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Run by path, Python looks for imports beside this file; the package stands one folder higher.
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    import os

    from cit_scale import cli, text

    # Before the imports below, which take seconds: nobody waits for help, or for a mistake in the arguments.
    cli.answer_early(sys.argv[1:], os.environ)
    text.outlive_readers()

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cit_scale import cli
from cit_scale.batch import Batch, LossTerms, MixedBatch
from cit_scale.checkpoint import layout
from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.async_save import AsyncCheckpointer
from cit_scale.config import RunConfig, TeacherConfig
from cit_scale.data.mixing import mix
from cit_scale.distributed import preflight
from cit_scale.distributed.lock import exclusive
from cit_scale.distributed.slurm_job import restart_count
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.watchdog import Watchdog
from cit_scale.distributed.world import World, agree_any, broadcast, gather, run_on_all_ranks, start
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import build_engine
from cit_scale.errors import (
    BadImageError,
    RefusedError,
    RunError,
    Stopped,
    exit_code_of,
)
from cit_scale.evaluate import HEADS_MEAN, evaluate
from cit_scale.files import read_note, rename_aside, sync, write_text
from cit_scale.losses import co_advise_loss
from cit_scale.models.network import load_weights
from cit_scale.optim import learning_rate
from cit_scale.run.bad_images import BadImages
from cit_scale.run.bad_steps import BadSteps, find_culprits
from cit_scale.run.metrics import RunLog, RunningMeans, StepClock
from cit_scale.run.progress import TrainingProgress, checkpoint_meta, restore, seed_step
from cit_scale.run.results import environment_record, print_table
from cit_scale.run.setup import Task, check, check_same_run, set_aside, writing
from cit_scale.run_folder import CONFIG, ENVIRONMENT, RESULTS
from cit_scale.teachers import Teacher, run_teachers

PREPARATION_S = 3600.0  # for each part of it: long enough to open a large data set for the first time

# What a finished run leaves for use, by name: the file of its last checkpoint that it is.
EXPORTS = {"student": layout.STUDENT, "student ema": layout.STUDENT_EMA}


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Parse, run, report. Returns the exit code; ``errors`` has their list.

    stop: of a caller that owns the signals already.
    """
    is_main = cli.is_first_rank(os.environ)
    try:
        arguments = cli.read_command_line(sys.argv[1:] if argv is None else argv, os.environ)
        world = World.from_env(os.environ)
        with StopRequest() if stop is None else contextlib.nullcontext(stop) as stop:
            join(arguments.config, world, stop)
            # A job that Slurm starts again goes on with what it has begun afresh.
            fresh = arguments.fresh and not restart_count(os.environ)
            results = run(arguments.config, world, stop, fresh=fresh, override=arguments.override_resume)
    except Stopped as stopped:
        if is_main:
            command = "the same command without --fresh" if arguments.fresh else "the same command"
            print(f"{stopped}; {command} continues there", flush=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        if is_main:
            print("interrupted before the first step; the same command starts again", flush=True)
        return Stopped.exit_code
    except RunError as error:  # raised on all ranks
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (BadImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # on the rank that met it
        return exit_code_of(error)
    if is_main:
        print_table(arguments.config.run_dir, results)
    return 0


def join(config: RunConfig, world: World, stop: StopRequest) -> None:
    """Collective. Check that all nodes are there and fit, then let the ranks into one process group."""
    if dist.is_initialized():
        return
    train = config.train
    store = preflight.meet(world, os.environ, config.run_dir, stop, train.start_timeout_s)
    preflight.try_to_reduce(world, os.environ, config.run_dir, stop, store)
    with contextlib.closing(watch_preparation(config, world)):
        start(world, store=store)


def run(
    config: RunConfig, world: World, stop: StopRequest, *, fresh: bool = False, override: bool = False
) -> dict[str, Any]:
    """Collective. Train the teachers that have no weights yet, then the student. Returns the student's results.

    fresh: set aside what stands in the run folder. override: go on with it although other settings began it.
    """
    same_run = not fresh and not override
    first = cli.teacher_runs(config)
    with contextlib.ExitStack() as held:
        with contextlib.closing(watch_preparation(config, world)) as watchdog:
            task = check(config, world, same_run=same_run)
            watchdog.progress()
            held.enter_context(exclusive(config.run_dir, world, stop))
            if fresh:
                set_aside(config.run_dir, world)
            elif same_run:  # again, now that no other job can write there
                run_on_all_ranks(world, lambda: [check_same_run(each) for each in (config, *first.values())])
        teachers = dict(config.teachers)
        with stop.shielded():
            for name, teacher_config in first.items():
                train(dataclasses.replace(task, config=teacher_config), {}, stop, override=override)
                weights = str(teacher_config.run_dir / layout.STUDENT)
                teachers[name] = dataclasses.replace(teachers[name], weights=weights)
            return train(task, teachers, stop, override=override)


def watch_preparation(config: RunConfig, world: World) -> Watchdog:
    """Ends all ranks where one of them hangs before the first step, unless train.step_timeout_s is 0.

    A process alone keeps nobody waiting.
    """
    limit_s = max(PREPARATION_S, config.train.step_timeout_s) if config.train.step_timeout_s else 0.0
    message = (
        f"the preparation of {config.run_dir} hangs: nothing was achieved for {limit_s:g} seconds; where each rank "
        "stands is above; if that is how long it takes, give it more by train.step_timeout_s"
    )
    return Watchdog(limit_s if world.world_size > 1 else 0.0, None, message if world.is_main else None)


@dataclass(frozen=True)
class Session:
    """One process's work at a run: what it trains, with what, and whom it tells."""

    task: Task
    engine: Engine
    teachers: Sequence[Teacher]
    inputs: Mapping[str, str]
    """Fingerprints by name: what the numbers in a checkpoint depend on and the configuration does not show."""

    bad_images: BadImages
    log: RunLog
    stop: StopRequest
    watchdog: Watchdog
    started_at: float
    """When the run was first started, in seconds since 1970."""

    def goodput(self, useful_s: float) -> float | None:
        """The share of the time since the run's first start that went into steps that count, if clocks are right."""
        wall_s = time.time() - self.started_at
        return useful_s / wall_s if 0 < useful_s <= wall_s else None

    def eval_batches(self, step: int) -> Iterator[Batch]:
        """Collective. This rank's share of the evaluation set, once. Raises Stopped on all ranks if one is asked to."""
        for batch in self.task.eval_batches():
            self.watchdog.progress()
            if any(agree_any(self.task.world, self.stop.requested)):
                raise Stopped(step, self.stop.signum)
            yield batch


def train(
    task: Task, teachers: Mapping[str, TeacherConfig], stop: StopRequest, *, override: bool = False
) -> dict[str, Any]:
    """Collective. Train the student with frozen ``teachers``, which have weights, from where the run folder stands.

    A finished run is left as it is. Raises Stopped, with everything saved, when ``stop`` is requested on any rank.
    """
    config, world, run_dir = task.config, task.world, task.config.run_dir
    now = time.time()
    with contextlib.closing(watch_preparation(config, world)) as preparation:
        finished = broadcast(world, read_note(run_dir / RESULTS) if world.is_main else None)
        is_finished = isinstance(finished, dict) and "steps" in finished
        if is_finished and (finished["steps"] == task.total_steps or not override):
            if not override:
                run_on_all_ranks(world, lambda: refuse_other_data(task, finished))
            return finished
        advisers = run_on_all_ranks(
            world, lambda: [task.load_teacher(name, teacher) for name, teacher in teachers.items()]
        )
        preparation.progress()
        engine = build_engine(task.build_student(), config, world, task.batch_split.micro_steps)
        preparation.progress()

        inputs = fingerprints(task, advisers)
        progress, overridden = TrainingProgress(), []
        found = checkpoint.load_newest(run_dir, world)
        preparation.progress()
        if found is not None:
            meta = found.meta
            progress, overridden = run_on_all_ranks(world, lambda: restore(meta, task, inputs, override=override))
            engine.load_state(found.state)
            del found  # its files are open, and the checkpoint will be deleted some day
        with writing(run_dir):
            started_at = run_on_all_ranks(
                world, lambda: begin(task, progress, overridden, now) if world.is_main else 0.0
            )
    with writing(run_dir):
        stacks, message = run_dir / f"stacks_rank_{world.rank}.txt", hang_message(config) if world.is_main else None
        watchdog = run_on_all_ranks(world, lambda: Watchdog(config.train.step_timeout_s, stacks, message))
    with contextlib.closing(watchdog), contextlib.closing(open_log(task, progress)) as log:
        bad_images = BadImages(run_dir, (task.train_images, task.eval_images), config.data.max_bad_images, world)
        session = Session(task, engine, advisers, inputs, bad_images, log, stop, watchdog, started_at)
        plan = task.batch_split
        start_of_run = f"continues after step {progress.step}" if progress.step else f"starts in {run_dir}"
        cut = f"{world.world_size} ranks x {plan.micro_steps} micro-steps x {plan.micro_batch_size} images"
        log.say(f"{start_of_run}; an update is {cut}")
        for change in overridden:
            log.say(f"continues although this changed: {change}")
        images_per_s = train_steps(session, progress)
        return finish(session, teachers, progress, images_per_s)


def open_log(task: Task, progress: TrainingProgress) -> RunLog:
    config = task.config
    return RunLog(config.run_dir, task.world, title=config.name, step=progress.step, total_steps=task.total_steps)


def refuse_other_data(task: Task, finished: Mapping[str, Any]) -> None:
    """Raise RefusedError for results of other images than the task's. Results of earlier versions do not tell."""
    noted, here = finished.get("inputs", {}), data_fingerprints(task)
    other = [name for name in here if noted.get(name, here[name]) != here[name]]
    if other:
        raise RefusedError(
            f"{task.config.run_dir} holds a finished run of other {' and '.join(other)}; give this one another --name, "
            "or set that one aside with --fresh"
        )


def data_fingerprints(task: Task) -> dict[str, str]:
    return {"data": task.train_set.fingerprint, "evaluation data": task.eval_set.fingerprint}


def fingerprints(task: Task, advisers: Sequence[Teacher]) -> dict[str, str]:
    """Collective. Of what the run learns and is judged from, by name, the same on all ranks; RefusedError otherwise."""
    inputs = {
        **data_fingerprints(task),
        **{f"teacher {adviser.name}": adviser.sha256 for adviser in advisers},
    }
    for rank, theirs in enumerate(gather(task.world, inputs)):
        different = [name for name in inputs if theirs[name] != inputs[name]]
        if different:
            raise RefusedError(
                f"ranks {min(rank, task.world.rank)} and {max(rank, task.world.rank)} read different files as "
                f"{', '.join(different)}; put one copy where all nodes see it"
            )
    return inputs


def begin(task: Task, progress: TrainingProgress, overridden: Sequence[str], now: float) -> float:
    """On rank 0. Note this start in the run folder. Returns when the first one was, in seconds since 1970."""
    run_dir = task.config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / CONFIG, cli.to_yaml(task.config))
    if (run_dir / RESULTS).exists():
        rename_aside(run_dir / RESULTS)  # the run goes on, and these are not its results any more
    path = run_dir / ENVIRONMENT
    starts = read_note(path) or []
    place = {"step": progress.step, "total_steps": task.total_steps, "time": now, "overridden": overridden}
    about = {**place, **environment_record(task.world)}
    write_text(path, json.dumps([*starts, about], indent=2) + "\n")
    return [*starts, about][0].get("time", now)


def hang_message(config: RunConfig) -> str:
    return (
        f"nothing was achieved for train.step_timeout_s={config.train.step_timeout_s:g} seconds, the run hangs; "
        f"where each rank stands is in {config.run_dir}/stacks_rank_*.txt; the same command continues from the last "
        "checkpoint"
    )


def train_steps(session: Session, progress: TrainingProgress) -> float | None:
    """Collective. From where ``progress`` stands to the last step. Returns images/s of the whole job.

    Each turn begins between two updates with what is due there: logs, evaluation, checkpoint, leaving.
    """
    task, engine, log = session.task, session.engine, session.log
    config, world = task.config, task.world
    checkpointer = AsyncCheckpointer(
        engine, config.run_dir, config.train, world, step=progress.step, say=log.say, report=log.note
    )
    bad_images, bad_steps = session.bad_images, BadSteps(progress, config.run_dir, config.train.max_bad_steps, world)
    batches = task.train_batches(progress.step)
    means, clock, latest = RunningMeans(), StepClock(), {}
    is_useful = False  # whether the turn before made a step that counts
    engine.module.train()
    while True:
        stopping, bad_images_met, save_is_due, save_has_failed = agree_any(
            world,
            session.stop.requested,
            bad_images.has_news,
            world.is_main and checkpointer.is_due(progress.step),
            checkpointer.has_failed,
        )
        session.watchdog.progress()
        turn_s = clock.turn()
        if is_useful:
            progress.useful_s += turn_s
        is_last = progress.step >= task.total_steps
        if bad_images_met:
            bad_images.collect(log.say)
        if save_has_failed:
            with clock.excluded():
                checkpointer.settle()
        if clock.turns and (is_last or stopping or progress.step % config.train.log_every_steps == 0):
            speed = clock.interval_images_per_s(config.train.global_batch_size)
            pace = {"images_per_s": speed, "goodput": session.goodput(progress.useful_s)}
            log.record(progress.step, {**means.drain(world), **latest, **pace})
        eval_is_due = progress.step and progress.step % (config.train.eval_every_epochs * task.steps_per_epoch) == 0
        if eval_is_due and not (is_last or stopping or progress.evaluated):
            with clock.excluded():
                stopping = not evaluate_student(session, progress)

        is_leaving = is_last or stopping or bad_images.too_many or bad_steps.too_many
        if is_leaving or save_is_due or (progress.evaluated and config.train.keep_best):
            with clock.excluded():
                checkpointer.save(progress.step, checkpoint_meta(progress, task, session.inputs))
            session.watchdog.progress()
        if is_leaving:
            checkpointer.settle(insist=True)
            session.watchdog.progress()
        bad_images.refuse_too_many()
        if bad_steps.too_many:
            bad_steps.give_up(mixed_batches(task, progress.step - 1))
        if stopping:
            raise Stopped(progress.step, session.stop.signum)
        if is_last:
            return clock.mean_images_per_s(config.train.global_batch_size)

        lr = learning_rate(progress.step, config.optim, config.peak_lr, task.steps_per_epoch, config.train.epochs)
        seed_step(config.seed, progress.step, world.rank)
        trained = train_step(engine, session.teachers, batches, task, progress.step, lr)
        latest = {"lr": lr, "grad_norm": trained.result.grad_norm}
        progress.advance()
        log.advance(progress.step)
        is_useful = not trained.result.skipped
        if not is_useful:
            bad_steps.count(find_culprits(progress.step, trained.result, trained.terms, trained.samples, world), log)
            continue
        bad_steps.count_good()
        for term in trained.terms:
            means.add({"loss": term.total, "loss_label": term.label, **_named("loss_", term.distillation)})


@dataclass(frozen=True)
class TrainedStep:
    """terms, samples: the loss and the images' indices of each micro-step of this rank."""

    result: StepResult
    terms: list[LossTerms]
    samples: list[Tensor]


def train_step(
    engine: Engine, teachers: Sequence[Teacher], batches: Iterator[Batch], task: Task, step: int, lr: float
) -> TrainedStep:
    """Collective. One update from the next global batch."""
    config = task.config
    weights = {name: teacher.weight for name, teacher in config.teachers.items()}
    terms, samples = [], []
    for _ in range(engine.micro_steps):
        batch = next(batches)
        mixed = mix(batch, config.mixing, task.num_classes, seed=config.seed, step=step)
        teacher_logits = run_teachers(teachers, mixed.images)
        logits = engine.forward(mixed.images)
        loss = co_advise_loss(
            logits, teacher_logits, mixed.targets, temperature=config.distill.temperature, weights=weights
        )
        engine.backward(loss.total)
        terms.append(loss)
        samples.append(batch.samples)
    return TrainedStep(engine.step(lr), terms, samples)


def mixed_batches(task: Task, step: int) -> Iterator[MixedBatch]:
    """What this rank learns from in update ``step``, counted from 0, once more: the data stream is a pure function."""
    for batch in itertools.islice(task.train_batches(step), task.batch_split.micro_steps):
        yield mix(batch, task.config.mixing, task.num_classes, seed=task.config.seed, step=step)


def evaluate_student(session: Session, progress: TrainingProgress) -> bool:
    """Collective. Log the accuracy of the student and of its moving average. False if asked to stop meanwhile."""
    engine, world = session.engine, session.task.world
    engine.module.eval()
    try:
        top1 = evaluate(engine.forward, session.eval_batches(progress.step), world).top1
        numbers = _named("top1_", top1)
        if session.task.config.optim.ema_decay is not None:
            with engine.averaged():
                averaged = evaluate(engine.forward, session.eval_batches(progress.step), world)
            numbers |= _named("top1_ema_", averaged.top1)
    except Stopped:
        return False
    finally:
        engine.module.train()
    progress.evaluated = True
    session.log.record(progress.step, numbers)
    if world.is_main:
        with contextlib.suppress(OSError):  # a full disk is told of by whoever has more to lose
            checkpoint.add_score(session.task.config.run_dir, progress.step, top1.get(HEADS_MEAN, top1["cls"]))
    return True


def finish(
    session: Session, teachers: Mapping[str, TeacherConfig], progress: TrainingProgress, images_per_s: float | None
) -> dict[str, Any]:
    """Collective. Bring the weights out, evaluate what is in the files, and the teachers, and write the results.

    Raises Stopped when asked to stop meanwhile; everything is saved.
    """
    task = session.task
    config, world, run_dir = task.config, task.world, task.config.run_dir
    with writing(run_dir):
        files = run_on_all_ranks(world, lambda: export_weights(run_dir, progress.step) if world.is_main else {})
    accuracy = {}
    for name, file in broadcast(world, files).items():
        network = task.build_student()
        run_on_all_ranks(world, lambda network=network, file=file: load_weights(network, run_dir / file))
        network.eval().to(world.device)
        accuracy[name] = evaluate(network, session.eval_batches(progress.step), world)
    results = {
        "model": config.student.name,
        "steps": progress.step,
        "bad_steps": progress.bad_steps,
        "images_per_s": images_per_s,
        "goodput": session.goodput(progress.useful_s),
        "eval_images": next(iter(accuracy.values())).images,
        "inputs": dict(session.inputs),
        "accuracy": {name: {"top1": found.top1, "top5": found.top5} for name, found in accuracy.items()},
        "teachers": {},
    }
    if session.teachers:
        batches = session.eval_batches(progress.step)
        measured = evaluate(lambda images: run_teachers(session.teachers, images), batches, world)
        results["teachers"] = {
            adviser.name: {
                "model": teachers[adviser.name].model,
                "sha256": adviser.sha256,
                "top1": measured.top1[adviser.name],
                "top5": measured.top5[adviser.name],
            }
            for adviser in session.teachers
        }
    session.bad_images.collect(session.log.say)
    text = json.dumps(results, indent=2) + "\n"
    with writing(run_dir):
        run_on_all_ranks(world, lambda: write_text(run_dir / RESULTS, text) if world.is_main else None)
    return results


def export_weights(run_dir: Path, step: int) -> dict[str, str]:
    """On rank 0. Put the weights of a checkpoint beside it, under the same names. Returns the files by name."""
    files = {}
    for name, file in EXPORTS.items():
        saved = checkpoint.path(run_dir, step) / file
        if saved.exists():
            partial = run_dir / f"{file}.partial"
            shutil.copyfile(saved, partial)
            sync(partial)
            partial.replace(run_dir / file)
            files[name] = file
    return files


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


if __name__ == "__main__":
    raise SystemExit(main())
