"""Train a run: ``deepspeed cit_scale/train.py``, ``torchrun cit_scale/train.py`` or ``python cit_scale/train.py``.

main -> run (teachers first, then the student) -> train (one network) -> training_loop -> train_step -> engine.step.
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

    # Before the imports below, which take seconds: help and mistakes in the arguments are answered at once.
    parsed = cli.answer_early(sys.argv[1:], os.environ)
    text.outlive_readers()

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cit_scale import cli
from cit_scale.batch import Batch, LossTerms, MixedBatch
from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.async_save import AsyncCheckpointer
from cit_scale.config import EngineConfig, RunConfig, TeacherConfig
from cit_scale.data.mixing import mix
from cit_scale.distributed import preflight
from cit_scale.distributed.lock import exclusive
from cit_scale.distributed.overseer import SECONDS
from cit_scale.distributed.slurm_job import restart_count
from cit_scale.distributed.stop import StopRequest
from cit_scale.distributed.watchdog import Watchdog
from cit_scale.distributed.world import Votes, World, broadcast, run_on_all_ranks, start
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import build_engine
from cit_scale.errors import (
    BadImageError,
    ConfigError,
    DeviceMemoryError,
    MissingInputError,
    RunError,
    Stopped,
    error_line,
    exit_code_of,
    is_out_of_memory,
)
from cit_scale.evaluate import HEADS_MEAN, evaluate
from cit_scale.files import free_name, read_note, read_notes, rename_aside, write_text
from cit_scale.losses import co_advise_loss
from cit_scale.models.arithmetic import naming_operator, set_arithmetic
from cit_scale.optim import learning_rate
from cit_scale.report.at_end import leave_report
from cit_scale.run.auto import has_bf16, with_compile, with_precision
from cit_scale.run.bad_images import BadImages
from cit_scale.run.bad_steps import BadSteps, find_culprits
from cit_scale.run.begun import given_note
from cit_scale.run.card import card_text
from cit_scale.run.flops import ModelFlops, model_flops
from cit_scale.run.folders import numbers
from cit_scale.run.forecast import forecast_lines
from cit_scale.run.inputs import (
    OF_EVALUATION,
    changed_inputs,
    fingerprints,
    keep_hashes,
    refuse_different,
    refuse_other_inputs,
)
from cit_scale.run.memory import explaining_out_of_memory
from cit_scale.run.metrics import RunLog, RunningMeans, StepClock
from cit_scale.run.networks import describe_student, evaluate_teachers
from cit_scale.run.plan import arithmetic_text, classes_text, counted
from cit_scale.run.progress import TrainingProgress, checkpoint_meta, restore, seed_step
from cit_scale.run.results import (
    EXPORTS,
    device_name,
    environment_record,
    export_best,
    export_weights,
    measure,
    print_table,
)
from cit_scale.run.setup import PreparedRun, check_same_runs, prepare, set_aside, writing
from cit_scale.run_folder import CARD, CONFIG, DESCRIPTION, ENVIRONMENT, RESULTS, STREAM, STUDENT
from cit_scale.settings import to_yaml
from cit_scale.teachers import Teacher, frozen_teacher, run_teachers

# Longest time without progress before the first step: indexing a large data set for the first time takes this long.
PREPARATION_S = 3600.0


def main(
    argv: Sequence[str] | None = None, stop: StopRequest | None = None, *, arguments: cli.Arguments | None = None
) -> int:
    """Parse the command line, run it, print the result. Returns an exit code of ``errors``.

    stop: the caller's, if it handles the signals already. arguments: ``argv`` as the caller has parsed it already.
    """
    is_main = cli.is_first_rank(os.environ)
    try:
        if arguments is None:
            arguments = cli.read_command_line(sys.argv[1:] if argv is None else argv, os.environ)
        world = World.from_env(os.environ)
        with StopRequest() if stop is None else contextlib.nullcontext(stop) as stop:
            join(arguments.config, world, stop)
            results = run(arguments, world, stop)
    except Stopped as stopped:
        if is_main:
            fresh = arguments is not None and arguments.fresh
            command = "the same command without --fresh" if fresh else "the same command"
            print(f"{stopped}; {command} continues there", flush=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        if is_main:
            print("interrupted before training began; the same command starts or continues it", flush=True)
        return Stopped.exit_code
    except RunError as error:  # raised on all ranks, printed by one, but for memory that may be short on one alone
        if is_main or isinstance(error, DeviceMemoryError):
            fresh = arguments is not None and arguments.fresh and "the same command" in str(error)
            print(f"error: {error_line(error)}{' (without --fresh)' if fresh else ''}", file=sys.stderr, flush=True)
        return error.exit_code
    except (BadImageError, OSError) as error:  # maybe of this rank alone, so each rank that meets one prints it
        print(f"error: {error_line(error)}", file=sys.stderr, flush=True)
        return exit_code_of(error)
    except (RuntimeError, MemoryError) as error:  # of memory before there is a prepared run, with which to explain it
        if not is_out_of_memory(error):
            raise
        print(f"error: rank {os.environ.get('RANK', 0)}: {error_line(error)}", file=sys.stderr, flush=True)
        return ConfigError.exit_code
    if is_main:
        print_table(arguments.config.run_dir, results)
    return 0


def join(config: RunConfig, world: World, stop: StopRequest) -> None:
    """Collective. Wait for all nodes, check that each can compute and communicate, and join one process group."""
    if dist.is_initialized():
        return
    train = config.train
    store = preflight.meet(world, os.environ, config.run_dir, stop, train.start_timeout_s)
    preflight.try_to_reduce(world, os.environ, config.run_dir, stop, store)
    with watch_preparation(config, world):
        start(world, store=store)


def run(arguments: cli.Arguments, world: World, stop: StopRequest) -> dict[str, Any]:
    """Collective. Train the teachers that have no weights, then the student. Returns the student's results."""
    override = arguments.override_resume
    # --fresh sets a run aside once: a job that Slurm has requeued continues the run that it began.
    fresh = arguments.fresh and not restart_count(os.environ)
    same_run = not fresh and not override
    if not fresh:
        arguments = run_on_all_ranks(world, arguments.as_begun)
    config, teacher_configs = broadcast(world, run_on_all_ranks(world, lambda: with_precisions(arguments, world)))
    # Before the first matrix product of this process: cuBLAS asks the environment only then.
    run_on_all_ranks(world, lambda: compute_as(config.engine, world))
    with contextlib.ExitStack() as held:
        with watch_preparation(config, world) as watchdog:
            prepared = prepare(config, teacher_configs, world, same_run=same_run, fresh=fresh)
            prepared = with_compile(with_given(prepared, arguments))
            watchdog.progress()
            held.enter_context(exclusive(config.run_dir, world, stop))
            if fresh:
                set_aside(config.run_dir, world)
            elif same_run:
                runs = (*prepared.teacher_runs.values(), prepared)
                # Checked again under the lock: before, another job could still write to the folder.
                run_on_all_ranks(world, lambda: check_same_runs(each.config for each in runs))
                for each in runs:
                    run_on_all_ranks(world, partial(refuse_other_inputs, each, each.config.teachers))
            if world.device.type == "cuda" and prepared.teacher_runs and not prepared.has_begun:
                try_student(prepared)
                watchdog.progress()
            if config.train.forecast and not any(
                each.has_begun for each in (prepared, *prepared.teacher_runs.values())
            ):
                say_forecast(prepared, stop)
                watchdog.progress()
        teachers = dict(config.teachers)
        # From here on a second Ctrl-C waits until the state is saved; before, it interrupts at once.
        with stop.shielded():
            for name, teacher_run in prepared.teacher_runs.items():
                train(teacher_run, {}, stop, override=override)
                release_networks(world)
                weights = str(teacher_run.config.run_dir / STUDENT)
                teachers[name] = dataclasses.replace(teachers[name], weights=weights)
            results = train(prepared, teachers, stop, override=override)
            if config.train.report:
                release_networks(world)
                leave_report(config, world, stop)
            return results


def compute_as(engine: EngineConfig, world: World) -> None:
    set_arithmetic(world.device, tf32=engine.tf32, deterministic=engine.deterministic)


@naming_operator()
@explaining_out_of_memory
def try_student(prepared: PreparedRun) -> None:
    """Collective. ``try_update`` before the teachers are trained, which may take days: they are here as initialized."""
    say_that_it_tries(prepared)
    config, device = prepared.config, prepared.world.device
    teachers = [
        frozen_teacher(
            name, prepared.build_teacher_without_weights(teacher), config.distill, config.data.image_size, device
        )
        for name, teacher in config.teachers.items()
    ]
    try_update(build_engine(prepared.build_student(), prepared.engine_setup), teachers, prepared)
    del teachers
    release_networks(prepared.world)


def release_networks(world: World) -> None:
    """Give back what networks that are no longer needed leave behind: engines, which hold themselves in circles, what
    was compiled for them, their share of the device's memory, and its peak.
    """
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)


def with_precisions(arguments: cli.Arguments, world: World) -> tuple[RunConfig, dict[str, RunConfig]]:
    """The configuration of the run and of its teachers' runs, with the precisions that ``auto`` stands for."""
    decide = partial(with_precision, bf16=has_bf16(world.device))
    return decide(arguments.config), {name: decide(config) for name, config in arguments.teacher_run_configs.items()}


def with_given(prepared: PreparedRun, arguments: cli.Arguments) -> PreparedRun:
    """The run, and its teachers' runs, with what the user gave of their configurations."""
    teacher_runs = {
        name: dataclasses.replace(run, given=arguments.teacher_runs[name].given)
        for name, run in prepared.teacher_runs.items()
    }
    return dataclasses.replace(prepared, given=arguments.given, teacher_runs=teacher_runs)


def say_forecast(prepared: PreparedRun, stop: StopRequest) -> None:
    """Collective. Say how long the run will take. All ranks try at once, as they will compute at once."""
    for line in run_on_all_ranks(prepared.world, lambda: forecast_lines(prepared, lambda: stop.requested)):
        if prepared.world.is_main:
            print(f"{prepared.config.name}  {line}", flush=True)


def watch_preparation(config: RunConfig, world: World) -> Watchdog:
    """A watchdog for all that precedes the first step. Switched off by train.step_timeout_s=0.

    Off for a process alone, too: no other rank waits for it, and whoever started it sees that it does nothing.
    """
    limit_s = max(PREPARATION_S, config.train.step_timeout_s) if config.train.step_timeout_s else 0.0
    message = (
        f"the preparation of {config.run_dir} hangs: nothing was achieved for {limit_s:g} seconds; where each rank "
        "stands is above; if that is how long it takes, give it more by train.step_timeout_s"
    )
    return Watchdog(limit_s if world.world_size > 1 else 0.0, None, message if world.is_main else None)


@dataclass(frozen=True)
class LoadedRun:
    """The networks of a run, with the state from which training goes on."""

    engine: Engine

    teachers: Sequence[Teacher]

    inputs: Mapping[str, str]
    """Hashes of the data and of the teachers' files, by name: the configuration holds only their paths."""

    new: frozenset[str]
    """``Network.new`` of the student."""

    progress: TrainingProgress
    """Changes while the run is trained."""

    overridden: Sequence[str]
    """Settings and inputs that differ from the checkpoint's."""

    started_at: float
    """When the run was first started, in seconds since 1970."""


@dataclass(frozen=True)
class Session:
    """Everything that one process needs to train a network, from its first step to its last.

    votes: as ``flags_of`` this rank. outstanding: steps whose results have not been read yet, at most the newest one
    between two turns. flops: for the log, so on rank 0 only; None where the device's peak is not known.
    """

    prepared: PreparedRun
    loaded: LoadedRun
    log: RunLog
    stop: StopRequest
    watchdog: Watchdog
    checkpointer: AsyncCheckpointer
    bad_images: BadImages
    bad_steps: BadSteps
    votes: Votes
    outstanding: deque[OutstandingStep]
    means: RunningMeans
    clock: StepClock
    flops: ModelFlops | None

    @property
    def engine(self) -> Engine:
        return self.loaded.engine

    @property
    def teachers(self) -> Sequence[Teacher]:
        return self.loaded.teachers

    @property
    def progress(self) -> TrainingProgress:
        return self.loaded.progress

    def goodput(self) -> float | None:
        """Share of the time since the run's first start that was spent in steps that count.

        None before the first such step, and if clocks disagree.
        """
        useful_s, wall_s = self.progress.useful_s, time.time() - self.loaded.started_at
        return useful_s / wall_s if 0 < useful_s <= wall_s else None

    def eval_batches(self) -> Iterator[Batch]:
        """``interruptible_eval_batches`` of this run at this step."""
        return interruptible_eval_batches(self.prepared, self.progress.step, self.stop, self.watchdog)


@naming_operator()
@explaining_out_of_memory
def train(
    prepared: PreparedRun, teachers: Mapping[str, TeacherConfig], stop: StopRequest, *, override: bool = False
) -> dict[str, Any]:
    """Collective. Train the run's student, from the newest checkpoint on if there is one. Returns its results.

    teachers: by name; all of them have weights. Of a finished run ``finished_results`` are returned; with ``override``
    a run of another length is trained on. Raises Stopped, with everything saved, when ``stop`` is requested on any
    rank.
    """
    config, world, run_dir = prepared.config, prepared.world, prepared.config.run_dir
    compute_as(config.engine, world)  # again: the results of a teacher's run are measured in float32 proper
    with watch_preparation(config, world) as preparation:
        finished = broadcast(
            world, run_on_all_ranks(world, lambda: read_note(run_dir / RESULTS) if world.is_main else {})
        )
        is_finished = "steps" in finished
        if is_finished and (finished["steps"] == prepared.total_steps or not override):
            if not override:
                run_on_all_ranks(world, lambda: refuse_other_inputs(prepared, teachers))
            return finished_results(prepared, teachers, finished, stop, preparation)
        loaded = load(prepared, teachers, preparation, override=override)
    step = loaded.progress.step
    with writing(run_dir):
        stacks = run_dir / f"stacks_rank_{world.rank}.txt"
        message = hang_message(config) if world.is_main else None
        watchdog = run_on_all_ranks(world, lambda: Watchdog(config.train.step_timeout_s, stacks, message))
    with watchdog, contextlib.closing(open_log(prepared, step)) as log:
        checkpointer = AsyncCheckpointer(
            loaded.engine, run_dir, config.train, world, step=step, say=log.say, report=log.note
        )
        readers = (prepared.train_images, prepared.eval_images)
        bad_images = BadImages(run_dir, readers, config.data.max_bad_images, world)
        session = Session(
            prepared=prepared,
            loaded=loaded,
            log=log,
            stop=stop,
            watchdog=watchdog,
            checkpointer=checkpointer,
            bad_images=bad_images,
            bad_steps=BadSteps(loaded.progress, run_dir, config.train.max_bad_steps, world),
            votes=Votes(world, partial(flags_of, world, stop, bad_images, checkpointer)),
            outstanding=deque(),
            means=RunningMeans(),
            clock=StepClock(config.train.global_batch_size),
            flops=model_flops(prepared, device_name(world.device), log.say) if world.is_main else None,
        )
        split = prepared.batch_split
        start_of_run = f"continues after step {step}" if step else f"starts in {run_dir}"
        ranks, micro_steps = counted(world.world_size, "rank"), counted(split.micro_steps, "micro-step")
        log.say(f"{start_of_run}; an update is {ranks} x {micro_steps} x {split.micro_batch_size} images")
        log.say(
            f"trains {config.student.name} on {counted(len(prepared.train_set), 'image')} of {config.data.train} "
            f"in {prepared.num_classes} classes, advised by {' and '.join(config.teachers) or 'no teacher'}"
        )
        log.say(arithmetic_text(prepared, device_name(world.device)))
        if world.device.type == "cpu" and (config.engine.compile or (teachers and config.distill.compile)):
            log.say("its first step compiles, which takes a minute or two where that was not done before")
        if config.data.balance != "none" or config.distill.class_weights != "none":
            log.say(classes_text(prepared))
        for change in loaded.overridden:
            log.say(f"continues although this changed: {change}")
        teacher_results = evaluate_teachers(
            prepared, teachers, loaded.teachers, loaded.inputs, loaded.new, session.eval_batches, log.say
        )
        training_loop(session)
        return finish(session, teacher_results)


def load(
    prepared: PreparedRun, teachers: Mapping[str, TeacherConfig], preparation: Watchdog, *, override: bool
) -> LoadedRun:
    """Collective. Build the networks, and load the run folder's newest checkpoint into the engine, if there is one."""
    world, run_dir = prepared.world, prepared.config.run_dir
    began_at = time.time()  # before the networks are loaded, which takes time that trains nothing: goodput counts it
    frozen = run_on_all_ranks(
        world, lambda: [prepared.load_teacher(name, teacher) for name, teacher in teachers.items()]
    )
    preparation.progress()
    network = prepared.build_student()
    description, new = describe_student(prepared, network), network.new
    engine = build_engine(network, prepared.engine_setup)
    preparation.progress()
    if world.device.type == "cuda":  # on a CPU memory is the machine's, and the time better spent
        say_that_it_tries(prepared)
        try_update(engine, frozen, prepared)
        preparation.progress()

    inputs = run_on_all_ranks(world, lambda: fingerprints(prepared, teachers))
    refuse_different(world, inputs)
    progress, overridden = TrainingProgress(), list[str]()
    found = checkpoint.load_newest(run_dir, world)
    preparation.progress()
    if found is not None:
        meta = found.meta
        progress, overridden = run_on_all_ranks(world, lambda: restore(meta, prepared, inputs, override=override))
        engine.load_state(found.state)
        del found  # closes its files, before retention deletes the checkpoint
    with writing(run_dir):
        first = run_on_all_ranks(
            world, lambda: record_start(prepared, description, progress, overridden, began_at) if world.is_main else 0.0
        )
    started_at = broadcast(world, first)
    return LoadedRun(engine, frozen, inputs, new, progress, overridden, started_at)


def open_log(prepared: PreparedRun, step: int) -> RunLog:
    config = prepared.config
    return RunLog(config.run_dir, prepared.world, title=config.name, step=step, total_steps=prepared.total_steps)


def finished_results(
    prepared: PreparedRun,
    teachers: Mapping[str, TeacherConfig],
    finished: Mapping[str, Any],
    stop: StopRequest,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """Collective. Return the results of a finished run; if its evaluation data changed, evaluate it again first.

    finished: contents of its results.json. Those of earlier versions have no fingerprints and are returned unchanged.
    """
    run_dir, world = prepared.config.run_dir, prepared.world
    noted = finished.get("inputs", {})
    here = run_on_all_ranks(world, lambda: fingerprints(prepared, teachers))
    refuse_different(world, here)
    other = changed_inputs(noted, here)
    trained_with = " and ".join(name for name in other if name not in OF_EVALUATION)
    if trained_with and world.is_main:
        print(f"{run_dir} is finished, and is not trained again although this changed: {trained_with}", flush=True)
    if not set(other) & set(OF_EVALUATION):
        return dict(finished)
    if world.is_main:
        print(f"{run_dir} is finished; its evaluation data changed, so it is evaluated again", flush=True)
    frozen = run_on_all_ranks(world, lambda: [prepared.load_teacher(*each) for each in teachers.items()])
    files = broadcast(world, run_on_all_ranks(world, lambda: find_weights(run_dir, finished) if world.is_main else {}))

    def eval_batches() -> Iterator[Batch]:
        return interruptible_eval_batches(prepared, finished["steps"], stop, watchdog)

    def say(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    measured = measure(prepared, files, eval_batches)
    measured["teachers"] = evaluate_teachers(prepared, teachers, frozen, here, None, eval_batches, say)
    bad_images = BadImages(run_dir, (prepared.eval_images,), prepared.config.data.max_bad_images, world)
    bad_images.collect(say)
    results = {
        **finished,
        **measured,
        "inputs": {**noted, **{name: here[name] for name in OF_EVALUATION if name in here}},
    }
    results.pop("best", None)  # by the accuracy on other images

    def write() -> None:
        if world.is_main:
            # A copy: killed in between, the run is still a finished one. Its config.yaml stays as it was trained.
            shutil.copyfile(run_dir / RESULTS, free_name(run_dir / RESULTS))
            write_text(run_dir / CARD, card_text(prepared, results))
            write_text(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")

    with writing(run_dir):
        run_on_all_ranks(world, write)
    return results


def find_weights(run_dir: Path, finished: Mapping[str, Any]) -> dict[str, str]:
    """On rank 0. Return the weight files of a finished run, copied from its last checkpoint if they are missing.
    Raises MissingInputError.
    """
    files = {name: EXPORTS[name] for name in finished.get("accuracy", {}) if name in EXPORTS} or {
        "student": EXPORTS["student"]
    }
    if not all((run_dir / file).exists() for file in files.values()):
        export_weights(run_dir, finished["steps"])
    missing = [file for file in files.values() if not (run_dir / file).exists()]
    if missing:
        raise MissingInputError(
            f"{run_dir} is finished, but cannot be evaluated again, because {' and '.join(missing)} are gone; "
            "bring them back, or start over with --fresh"
        )
    return files


def record_start(
    prepared: PreparedRun,
    description: Mapping[str, Any],
    progress: TrainingProgress,
    overridden: Sequence[str],
    now: float,
) -> float:
    """On rank 0. Write config.yaml and config.json, add this start to env.json, and set the results of a run that goes
    on aside.

    description: of the student, for config.json. now: the time of this start. Returns the time of the first start. Both
    are in seconds since 1970.
    """
    run_dir = prepared.config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / CONFIG, to_yaml(prepared.config))
    keep_hashes(prepared)
    write_text(run_dir / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    if (run_dir / RESULTS).exists():
        rename_aside(run_dir / RESULTS)  # the run goes on: these are no longer its results
    path = run_dir / ENVIRONMENT
    starts = read_notes(path)
    place = {"step": progress.step, "total_steps": prepared.total_steps, "time": now, "overridden": overridden}
    about = {**place, **given_note(prepared.given), **environment_record(prepared.world)}
    write_text(path, json.dumps([*starts, about], indent=2) + "\n")
    return min(numbers(start.get("time") for start in [*starts, about]))


def hang_message(config: RunConfig) -> str:
    return (
        f"nothing was achieved for {SECONDS} seconds (train.step_timeout_s={config.train.step_timeout_s:g}), the run "
        f"hangs; where each rank stands is in {config.run_dir}/stacks_rank_*.txt; the same command, without --fresh, "
        "continues from the last checkpoint"
    )


def training_loop(session: Session) -> None:
    """Collective. Train from where the run stands to its last step: step, count, log, evaluate, save, leave.

    Everything but the step itself is done between two updates, where ranks agree and the training state is whole.
    Seeds, learning rate and data count steps from 0; logs, checkpoints and messages count the updates done.
    Raises what ``between_steps`` raises.
    """
    prepared, progress = session.prepared, session.progress
    config = prepared.config
    batches = session.clock.waiting_for(prepared.train_batches(progress.step))
    session.engine.module.train()
    # A run that was stopped may owe the evaluation after its last step, have no step left, or be asked to stop again.
    session.votes.cast()
    between_steps(session, None)
    while progress.step < prepared.total_steps:
        session.watchdog.begin_step()
        lr = learning_rate(progress.step, config.optim, config.peak_lr, prepared.steps_per_epoch, config.train.epochs)
        # Drop path and the like follow from the step, so that a checkpoint holds no generator's state.
        seed_step(config.seed, progress.step, prepared.world.rank)
        trained = train_step(session.engine, session.teachers, batches, prepared, progress.step, lr)
        progress.advance()
        session.log.advance(progress.step)
        between_steps(session, trained)


@dataclass(frozen=True)
class TrainedStep:
    """One update. terms, samples: loss terms and indices of the images, for each micro-step of this rank."""

    result: StepResult
    terms: list[LossTerms]
    samples: list[Tensor]


@dataclass(frozen=True)
class OutstandingStep:
    """An update that the device may still be at. turn_s: what it cost, with everything around it, in seconds."""

    step: int
    trained: TrainedStep
    turn_s: float


def train_step(
    engine: Engine, teachers: Sequence[Teacher], batches: Iterator[Batch], prepared: PreparedRun, step: int, lr: float
) -> TrainedStep:
    """Collective. One update from the next global batch."""
    terms, samples = [], []
    for _ in range(engine.micro_steps):
        batch = next(batches)
        loss = advised_loss(engine, teachers, batch, prepared, step)
        engine.backward(loss.total)
        terms.append(loss)
        samples.append(batch.samples)
    return TrainedStep(engine.step(lr), terms, samples)


def advised_loss(
    engine: Engine, teachers: Sequence[Teacher], batch: Batch, prepared: PreparedRun, step: int
) -> LossTerms:
    """Collective. The loss of one micro-batch of update ``step``, counted from 0: mix it, ask teachers and student."""
    config = prepared.config
    mixed = mix(batch, config.mixing, prepared.num_classes, seed=config.seed, step=step)
    teacher_logits = run_teachers(teachers, mixed.images)
    student_logits = engine.forward(mixed.images)
    return co_advise_loss(
        student_logits,
        teacher_logits,
        mixed.targets,
        temperature=config.distill.temperature,
        weights={name: teacher.weight for name, teacher in config.teachers.items()},
        class_weights=prepared.class_weights,
    )


def say_that_it_tries(prepared: PreparedRun) -> None:
    config = prepared.config
    compiles = config.engine.compile or (config.teachers and config.distill.compile)
    cost = "; it compiles, which takes minutes where that was not done before" if compiles else ""
    if prepared.world.is_main:
        print(f"{config.name}  tries an update at full size{cost}", flush=True)


def try_update(engine: Engine, teachers: Sequence[Teacher], prepared: PreparedRun) -> None:
    """Collective. An update on noise in the run's shapes, which changes nothing: whether the device's memory suffices
    shows, and what is compiled is compiled, without the data.
    """
    size, count, device = prepared.config.data.image_size, prepared.batch_split.micro_batch_size, prepared.world.device
    places = torch.arange(count)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    noise = Batch(torch.rand(count, 3, size, size, device=device), labels, positions=places, samples=places)
    engine.module.train()
    engine.try_out(lambda: advised_loss(engine, teachers, noise, prepared, 0).total)


def count_steps(session: Session, *, newest: bool) -> None:
    """Collective. Read the results of the steps that were not read yet, and count them.

    newest: the newest step's, too. It is left to the next turn otherwise, so that the device has work while the host
    waits for the step before; unless the run would end with one more bad step, and the newest may be that one.
    """
    outstanding = session.outstanding
    while len(outstanding) > 1 or (outstanding and (newest or session.bad_steps.at_limit)):
        count_step(session, outstanding.popleft())


def count_step(session: Session, done: OutstandingStep) -> None:
    """Collective where the step was skipped. Count it as good or bad, and add up its losses."""
    trained = done.trained
    if trained.result.skipped:
        world = session.prepared.world
        found = find_culprits(done.step, trained.result, trained.terms, trained.samples, world)
        session.bad_steps.count(found, session.log)
        return
    session.bad_steps.count_good()
    session.progress.useful_s += done.turn_s
    for term in trained.terms:
        session.means.add({"loss": term.total, "loss_label": term.label, **_named("loss_", term.distillation)})


def between_steps(session: Session, trained: TrainedStep | None) -> None:
    """Collective. Log, evaluate, save, leave: what is due after a step.

    trained: the step; None before the first step of this process. Raises Stopped when asked to stop, and BadDataError
    or DivergedError when too many images or steps are bad; the state is saved before. Raises what
    ``AsyncCheckpointer.save`` and ``settle`` raise where it could not be saved.

    The order matters. What the ranks voted a turn ago comes first, and a step ends with that: waiting for the slowest
    rank is part of it. Logging comes before evaluation, so that its throughput has no pause in it. Saving comes after
    evaluation, so that a run that goes on from the checkpoint does not evaluate again, and ``keep_best`` knows the
    score. Leaving is last: an exception that ends the loop comes after the save. If the run goes on, the ranks vote on
    what is to be done after the next step.
    """
    progress, clock, checkpointer = session.progress, session.clock, session.checkpointer
    due = what_is_due(session)
    turn_s = clock.turn()
    if trained is not None:
        session.outstanding.append(OutstandingStep(progress.step, trained, turn_s))
    count_steps(session, newest=due.log or due.evaluate)
    session.watchdog.progress()  # not before: a device that hangs is waited for where its results are read
    if due.bad_images:
        session.bad_images.collect(session.log.say)
    if due.failed_save:
        with clock.excluded():
            checkpointer.settle()

    if trained is not None and due.log:
        log_interval(session, trained)
    stopping = due.stop
    if due.evaluate:
        with clock.excluded():
            stopping = not evaluate_student(session)

    is_leaving = due.is_last or stopping or session.bad_images.too_many or session.bad_steps.too_many
    if is_leaving or due.save or (progress.evaluated and session.prepared.config.train.keep_best):
        count_steps(session, newest=True)
        with clock.excluded():
            checkpointer.save(progress.step, checkpoint_meta(progress, session.prepared, session.loaded.inputs))
        session.watchdog.progress()
    if is_leaving:
        checkpointer.settle(insist=True)
        session.watchdog.progress()
    session.bad_images.refuse_too_many()
    if session.bad_steps.too_many:
        session.bad_steps.give_up(mixed_batches(session.prepared, session.bad_steps.last_step - 1))
    if stopping:
        raise Stopped(progress.step, session.stop.signum)
    if not due.is_last:
        session.votes.cast()


@dataclass(frozen=True)
class Due:
    """What is to be done between two updates; the same on every rank."""

    stop: bool
    """Some rank was asked to stop."""

    bad_images: bool
    """Some rank has, or at the end may have, met images that it cannot use and that are not reported yet."""

    save: bool
    """A checkpoint is due, by steps or by rank 0's clock."""

    failed_save: bool
    """A checkpoint could not be written."""

    is_last: bool
    """No update is left."""

    log: bool
    """The logging interval ends, or training does."""

    evaluate: bool
    """The student is to be evaluated, and was not yet after this step."""


def flags_of(
    world: World, stop: StopRequest, bad_images: BadImages, checkpointer: AsyncCheckpointer
) -> tuple[bool, bool, bool, bool]:
    """What only some ranks know: asked to stop, met bad images, a checkpoint is overdue, one could not be written."""
    overdue = world.is_main and checkpointer.is_overdue
    return stop.requested, bad_images.has_news, overdue, checkpointer.has_failed


def what_is_due(session: Session) -> Due:
    """Collective. From the number of steps, and from what the ranks voted a turn ago."""
    prepared, step = session.prepared, session.progress.step
    config = prepared.config.train
    stop, bad_images, overdue, failed_save = session.votes.read()
    is_last = step >= prepared.total_steps
    ends_interval = step > 0 and step % (config.eval_every_epochs * prepared.steps_per_epoch) == 0
    return Due(
        stop=stop,
        # The news of a process's last step has no later turn.
        bad_images=bad_images or is_last or stop,
        save=overdue or session.checkpointer.is_due(step),
        failed_save=failed_save,
        is_last=is_last,
        log=is_last or stop or step % config.log_every_steps == 0,
        # After the last step ``finish`` evaluates the files instead.
        evaluate=ends_interval and not (is_last or stop or session.progress.evaluated),
    )


def log_interval(session: Session, trained: TrainedStep) -> None:
    """Collective. One line of metrics: the means since the last one, the newest step's numbers, what a step costs."""
    result = trained.result
    costs = session.clock.interval_costs(session.prepared.world)
    if session.flops is not None and costs["images_per_s"] is not None:
        costs["mfu"] = session.flops.utilisation(costs["images_per_s"])
    numbers = {
        **session.means.drain(session.prepared.world),
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        **costs,
        "goodput": session.goodput(),
    }
    session.log.record(session.progress.step, numbers)


def mixed_batches(prepared: PreparedRun, step: int) -> Iterator[MixedBatch]:
    """The micro-batches of update ``step``, counted from 0, made again: the data stream is a pure function."""
    for batch in itertools.islice(prepared.train_batches(step), prepared.batch_split.micro_steps):
        yield mix(batch, prepared.config.mixing, prepared.num_classes, seed=prepared.config.seed, step=step)


def evaluate_student(session: Session) -> bool:
    """Collective. Log the accuracy of the student and of its moving average. Returns False if asked to stop.

    The scores that ``keep_best`` goes by are those of all heads' mean.
    """
    engine, world, progress = session.engine, session.prepared.world, session.progress
    engine.module.eval()
    try:
        own = evaluate(engine.forward, session.eval_batches(), world)
        numbers = _named("top1_", own.top1) | {"class_mean": _whole(own.class_mean)}
        top1_ema = None
        if session.prepared.config.optim.ema_decay is not None:
            with engine.averaged():
                averaged = evaluate(engine.forward, session.eval_batches(), world)
            top1_ema = _whole(averaged.top1)
            numbers |= _named("top1_ema_", averaged.top1) | {"class_mean_ema": _whole(averaged.class_mean)}
    except Stopped:
        return False
    finally:
        engine.module.train()
    progress.evaluated = True
    session.log.record(progress.step, numbers)
    if world.is_main:
        with contextlib.suppress(OSError):  # the checkpoint that follows reports a full disk
            checkpoint.add_score(session.prepared.config.run_dir, progress.step, _whole(own.top1), top1_ema)
    return True


def finish(session: Session, teachers: Mapping[str, Any]) -> dict[str, Any]:
    """Collective. Copy the last and the best checkpoint's weights, evaluate the last, write card and results.json.

    teachers: from ``evaluate_teachers``.

    The files are evaluated, not the engine's weights, and in float32: as the user will load them. Raises Stopped if
    asked to stop; everything is saved by then.
    """
    prepared, progress = session.prepared, session.progress
    config, world, run_dir = prepared.config, prepared.world, prepared.config.run_dir
    with writing(run_dir):
        files = run_on_all_ranks(world, lambda: export_weights(run_dir, progress.step) if world.is_main else {})
    results = {
        "model": config.student.name,
        "steps": progress.step,
        "bad_steps": progress.bad_steps,
        "images_per_s": session.clock.mean_images_per_s(),
        "goodput": session.goodput(),
        "inputs": dict(session.loaded.inputs),
        STREAM: dataclasses.asdict(prepared.versions),
        **measure(prepared, broadcast(world, files), session.eval_batches),
        "teachers": dict(teachers),
    }
    session.bad_images.collect(session.log.say)

    def write() -> None:
        if not world.is_main:
            return
        results["best"] = export_best(run_dir, progress.step, results["accuracy"]) if config.train.keep_best else {}
        write_text(run_dir / CARD, card_text(prepared, results))
        write_text(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")

    with writing(run_dir):
        run_on_all_ranks(world, write)
    return broadcast(world, results)


def interruptible_eval_batches(
    prepared: PreparedRun, step: int, stop: StopRequest, watchdog: Watchdog
) -> Iterator[Batch]:
    """Collective. This rank's share of the evaluation set, once. Raises Stopped on all ranks if one must stop."""
    votes = Votes(prepared.world, lambda: (stop.requested,))
    for batch in prepared.eval_batches():
        watchdog.progress()
        if any(votes.read()):
            raise Stopped(step, stop.signum)
        votes.cast()
        yield batch
    votes.read()


def _whole(by_head: Mapping[str, float]) -> float:
    """The value of the mean over the heads, or of the only one."""
    return by_head.get(HEADS_MEAN, by_head["cls"])


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in values.items()}


if __name__ == "__main__":
    with StopRequest(ends_process=True) as stop_request:
        code = main(arguments=parsed, stop=stop_request)
    raise SystemExit(code)
