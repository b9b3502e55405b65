"""Soak test: does a run under random kills, signals and damage end bit for bit like an undisturbed run?

python -m cit_scale.bench.soak --minutes 10 --seed 1
python -m cit_scale.bench.soak --minutes 10 --seed 2 --engine fsdp2 --keep runs/soak --json soak.json

Starts the trainer with the deepspeed command, first undisturbed, then in another run folder under kills and signals,
with damage to its newest checkpoint between the starts. The seed determines the faults and their order; their moments
also depend on the speed of the machine. Exit code 0: the runs are identical, no request to stop lost a step, and no
kill lost more than two intervals between checkpoints. Otherwise the exit code is 1 and the folder is kept.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2, Signals
from typing import Any, TypeVar

import psutil
import safetensors.torch
import torch
import yaml

from cit_scale.bench.measure import machine_text, output_file, table
from cit_scale.config import REPOSITORY
from cit_scale.errors import Stopped
from cit_scale.models.network import build_network
from cit_scale.run.metrics import COSTS
from cit_scale.text import positive

T = TypeVar("T")

ENGINES = {
    "zero1": ["--engine.ds_config=zero1"],
    "zero2": ["--engine.ds_config=zero2"],
    "zero3": ["--engine.ds_config=zero3"],
    "fsdp2": ["--engine.name=fsdp2"],
}
SAVE_EVERY_STEPS = 5
STEPS_PER_EPOCH = 11  # 1,797 digits, of which a fifth is held out, in global batches of 128
RECIPE = """
student:
  name: cit_tiny_patch16_224
  kwargs: {patch_size: 8, depth: 2, embed_dim: 48, num_heads: 2, drop_path_rate: 0.1}
teachers:
  conv: {model: resnet10t}
  inv: {model: rednet26, kwargs: {layers: [1, 1, 1, 1], base_width: 16, stem_width: 16}}
data: {train: digits, image_size: 16, crop_ratio: 1.0}
augment: {crop_scale: [0.5, 1.0], flip_prob: 0.0, policy: null, erase_prob: 0.1}
distill: {compile: false}
optim: {lr: 2.0e-3, lr_batch_size: 128, warmup_epochs: 1, ema_decay: 0.99}
train: {global_batch_size: 128, log_every_steps: 1, eval_every_epochs: 4, step_timeout_s: 90, save_every_minutes: 0}
"""

# Shares of --minutes: the steps of one run without interruption, and the time of the last fault.
TRAINING_PART, FAULTS_PART = 0.12, 0.85
# Limits for a start and for an end. Longer means that the job hangs and its watchdog, set to 90 s, does not end it.
START_LIMIT_S, END_LIMIT_S = 240, 120
# Keys of meta.json that are not compared: times, and the settings, which hold the run's name.
OWN_META = ("useful_s", "config")


class Surprise(Exception):  # noqa: N818  what the soak looks for
    """A start behaved as no start may, for instance it hung. Arguments: the message, and the log file of the start."""


# ---------------------------------------------------------------------------------------------------------------------
# Plan of the faults

OUT_OF_PATIENCE = "SIGTERM, a rank, then SIGKILL, all"  # as a scheduler does at the end of its grace time

# Signal and target: one rank, the launcher (the deepspeed command), or all processes of the job.
KINDS = {
    "SIGKILL, a rank": (SIGKILL, "rank"),
    "SIGKILL, all": (SIGKILL, "all"),
    "SIGKILL, launcher": (SIGKILL, "launcher"),
    "SIGTERM, a rank": (SIGTERM, "rank"),
    OUT_OF_PATIENCE: (SIGTERM, "rank"),
    "SIGTERM, launcher": (SIGTERM, "launcher"),
    "SIGUSR1, a rank": (SIGUSR1, "rank"),
    "SIGUSR1, launcher": (SIGUSR1, "launcher"),
    "SIGUSR2, a rank": (SIGUSR2, "rank"),
    "SIGUSR2, all": (SIGUSR2, "all"),
    "SIGINT, a rank": (SIGINT, "rank"),
    "SIGINT, all": (SIGINT, "all"),
    "SIGINT, launcher": (SIGINT, "launcher"),
}
# Faults after which steps may be lost. All others ask the run to stop with everything saved, also SIGKILL of the
# launcher: the ranks survive it, notice it and save.
KILLS = ("SIGKILL, a rank", "SIGKILL, all", OUT_OF_PATIENCE)


@dataclass(frozen=True)
class Fault:
    """A planned fault.

    kind: a key of KINDS. startup_part: share of a usual start-up after which it comes; None: it comes in training,
    after ``patience`` times the mean number of steps. second: another signal to a rank within a second. damage: key of
    DAMAGES, done to the newest checkpoint before the next start. seed: of the remaining random choices.
    """

    kind: str
    startup_part: float | None
    patience: float
    second: Signals | None
    damage: str | None
    seed: int


def plan(seed: int) -> Iterator[Fault]:
    """Yields faults without end, determined by ``seed``.

    Every kind comes once before any comes again, and so does every damage. Half of the starts have no damage before
    them.
    """
    rng = random.Random(seed)
    kinds, damages = _deck(rng, list(KINDS)), _deck(rng, [*DAMAGES, *[None] * len(DAMAGES)])
    while True:
        kind, damage = next(kinds), next(damages)
        startup_part = rng.uniform(0.05, 1) if rng.random() < 0.2 else None
        second = rng.choice([SIGTERM, SIGUSR1, SIGUSR2, SIGINT]) if rng.random() < 0.4 and kind not in KILLS else None
        yield Fault(kind, startup_part, min(rng.expovariate(1), 2.5), second, damage, rng.getrandbits(32))


def _deck(rng: random.Random, cards: list[T]) -> Iterator[T]:
    """Yields the cards in random order, each once, then again in a new order, without end."""
    while True:
        yield from rng.sample(cards, len(cards))


# ---------------------------------------------------------------------------------------------------------------------
# Damage to a checkpoint


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def leave_partial(folder: Path, rng: random.Random) -> None:
    """Create what a killed save leaves behind: files of a later step without a manifest, one of them cut short."""
    partial = folder.with_name(f"step_{int(folder.name[5:]) + SAVE_EVERY_STEPS:06d}.partial")
    shutil.copytree(folder, partial, dirs_exist_ok=True)
    (partial / "MANIFEST.json").unlink()
    cut(any_file(partial, rng), rng)


def scramble_times(folder: Path, rng: random.Random) -> None:
    """Give all files of all checkpoints random times, by which nothing may be decided."""
    for path in sorted(folder.parent.rglob("*")):
        os.utime(path, (rng.uniform(0, 4e9), rng.uniform(0, 4e9)))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flipped": lambda folder, rng: flip_bit(any_file(folder, rng), rng),
    "file cut": lambda folder, rng: cut(any_file(folder, rng), rng),
    "file deleted": lambda folder, rng: any_file(folder, rng).unlink(),
    "manifest cut": lambda folder, rng: cut(folder / "MANIFEST.json", rng),
    ".partial left over": leave_partial,
    "times scrambled": scramble_times,
}
HARMLESS = (".partial left over", "times scrambled")  # the newest checkpoint stays good


# ---------------------------------------------------------------------------------------------------------------------
# One start of the trainer


class Job:
    """One start of the trainer by the deepspeed command, in a session of its own.

    Leaving the context kills all remaining processes of the session.
    """

    def __init__(self, run_dir: Path, arguments: Sequence[str], ranks: int, log: Path) -> None:
        # Let the system choose a free port.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_accelerators={ranks}"]
        program = run_dir.parent / "code" / "cit_scale" / "train.py"
        trainer = [str(program), f"--runs_dir={run_dir.parent}", f"--name={run_dir.name}"]
        command = [*launcher, f"--master_port={port}", *trainer, *arguments]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.run_dir, self.log, self.started_s = run_dir, log, time.monotonic()
        # A shell lets background processes ignore SIGINT, and child processes inherit that: the job would not react to
        # SIGINT either.
        if signal.getsignal(SIGINT) is signal.SIG_IGN:
            signal.signal(SIGINT, signal.default_int_handler)
        with log.open("w") as file:
            self._launcher = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.send(SIGKILL, self.targets("all"))
        self._launcher.wait()

    @property
    def began(self) -> int | None:
        """The step from which training continued in this start, 0 for a new run; None before training began."""
        found = re.search(r"continues after step (\d+)|starts in ", self.log.read_text(errors="replace"))
        return found and int(found[1] or 0)

    @property
    def last_step(self) -> int:
        """The last step with a complete line of losses in metrics.jsonl, of this start or an earlier one."""
        with suppress(FileNotFoundError), (self.run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))  # the end suffices: this runs 50 times a second
            steps = re.findall(rb'^\{"step": (\d+), "loss".*\}$', file.read(), re.MULTILINE)
            return int(steps[-1]) if steps else 0
        return 0

    @property
    def is_done(self) -> bool:
        """Whether the run is finished."""
        return (self.run_dir / "results.json").exists()

    @property
    def exit_code(self) -> int | None:
        """The launcher's exit code; None while any process of the job is left."""
        code = self._launcher.poll()
        return None if code is None or self.targets("all") else code

    def targets(self, target: str) -> list[psutil.Process]:
        """Living processes of the job: "all", the "launcher", or each "rank".

        Found by session, which ranks keep after the launcher has died.
        """
        found = []
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):  # a process may end between two calls
                if os.getsid(pid) == self._launcher.pid:
                    process = psutil.Process(pid)
                    is_rank = any(word.startswith("--local_rank=") for word in process.cmdline())
                    is_target = {"all": True, "launcher": pid == self._launcher.pid, "rank": is_rank}[target]
                    if is_target and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def send(self, signum: Signals, processes: Sequence[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def wait(self, is_reached: Callable[[], bool], limit_s: float = math.inf) -> bool:
        """Wait until ``is_reached`` returns True. Returns False if the job ended before.

        Raises Surprise after ``limit_s`` seconds.
        """
        deadline = time.monotonic() + limit_s
        while not is_reached():
            if self.exit_code is not None:
                return False
            if time.monotonic() > deadline:
                raise Surprise(f"neither made progress nor ended within {limit_s:.0f} s", self.log)
            time.sleep(0.02)
        return True


def strike(job: Job, fault: Fault, step_s: float) -> None:
    """Send the signals of a fault at random moments: within a step, and a second one within a second."""
    (signum, target), rng = KINDS[fault.kind], random.Random(fault.seed)

    def draw(processes: list[psutil.Process]) -> list[psutil.Process]:
        return rng.sample(processes, min(1, len(processes)))

    time.sleep(rng.uniform(0, step_s))
    job.send(signum, draw(job.targets(target)) if target == "rank" else job.targets(target))
    time.sleep(rng.uniform(0, 1))
    if fault.kind == OUT_OF_PATIENCE:
        job.send(SIGKILL, job.targets("all"))
    elif fault.second:
        job.send(fault.second, draw(job.targets("rank")))


@dataclass
class Start:
    """Record of one start.

    began: step from which training continued; None if training did not begin. struck_at, reached: last step in
    metrics.jsonl at the time of the fault and at the end. newest: step of the newest good checkpoint at the end.
    seconds, startup_s: duration of the start, and of its start-up; startup_s is None if training did not begin.
    kind: of the fault; None if the job ended before it. damage, lost_by_damage: done after the end, and its cost in
    steps.
    """

    began: int | None
    struck_at: int
    reached: int
    newest: int
    exit_code: int | None
    seconds: float
    startup_s: float | None
    kind: str | None
    second: str | None
    in_startup: bool
    damage: str | None = None
    lost_by_damage: int = 0

    @property
    def lost(self) -> int:
        """Number of steps that were done but are not in a checkpoint."""
        return 0 if self.began is None else max(self.began, self.reached) - self.newest

    def __str__(self) -> str:
        came = "never began" if self.began is None else f"from step {self.began}"
        second = f", then {self.second}" if self.second else ""
        where = "in start-up" if self.in_startup else f"at step {self.struck_at}"
        damage = f"; {self.damage}, which costs {self.lost_by_damage}" if self.damage else ""
        what = f"{self.kind}{second} {where}" if self.kind else "undisturbed"
        return f"{came}, {what}, exit code {self.exit_code}, {self.lost} steps lost{damage}"


def watch(
    job: Job, fault: Fault | None, damaged: set[int], startup_s: float = 0, step_s: float = 0, mean_steps: float = 0
) -> Start:
    """Watch one start until it ends, and strike it with ``fault`` when its time has come. Returns the record.

    damaged: steps of damaged checkpoints; emptied once the trainer has set them aside. startup_s, step_s: usual seconds
    of a start-up and a step. mean_steps: mean number of steps before a fault. Raises Surprise for behaviour that is
    wrong.
    """

    def is_early() -> bool:
        if fault is None:
            return False
        is_time = time.monotonic() - job.started_s >= (fault.startup_part or math.inf) * startup_s
        return is_time and bool(job.targets(KINDS[fault.kind][1]))

    expected = max(committed(job.run_dir).keys() - damaged, default=0)
    is_alive = job.wait(lambda: job.began is not None or is_early(), START_LIMIT_S)
    began, began_after_s = job.began, time.monotonic() - job.started_s
    if is_alive and fault and began is not None:
        is_alive = job.wait(lambda: job.last_step >= began + max(1, fault.patience * mean_steps))
    struck = fault if is_alive else None
    struck_at = expected if began is None else job.last_step
    if struck is not None:
        strike(job, struck, step_s)
    job.wait(lambda: False, math.inf if struck is None else END_LIMIT_S)

    if job.began is not None:
        damaged.clear()
        if job.began != expected:
            raise Surprise(f"continued from step {job.began}; the newest good checkpoint is {expected}", job.log)
    start = Start(
        began=job.began,
        struck_at=struck_at,
        reached=job.last_step,
        newest=max(committed(job.run_dir).keys() - damaged, default=0),
        exit_code=job.exit_code,
        seconds=time.monotonic() - job.started_s,
        startup_s=None if began is None else began_after_s,
        kind=None if struck is None else struck.kind,
        second=struck.second.name if struck is not None and struck.second else None,
        in_startup=struck is not None and began is None,
    )
    if wrong := complaint(start, job.is_done, job.log.read_text()):
        raise Surprise(f"{start}: {wrong}", job.log)
    return start


def complaint(start: Start, is_done: bool, log: str) -> str | None:
    """Returns what was wrong with the end of a start, or None. is_done: the run has written its results."""
    if start.kind is None:
        return None if is_done and start.exit_code == 0 else "failed although nothing disturbed it"
    if is_done:
        # A signal near the end of training comes too late to stop the run; four intervals are plenty of time to react.
        is_deaf = start.began is not None and start.reached > start.struck_at + 4 * SAVE_EVERY_STEPS
        return "trained to the end in spite of a request to stop" if is_deaf else None
    if start.in_startup or start.kind in KILLS:
        return None  # a killed job, or one that does not handle signals yet, may end in any way
    # The launcher's own exit code: it may die of the signal (-signum) while the ranks save and stop without it.
    signum, target = KINDS[start.kind]
    codes = {Stopped.exit_code} if target == "rank" else {Stopped.exit_code, -signum, 1}
    if start.exit_code not in codes or "; the same command continues there" not in log:
        return f"a run that is asked to stop prints that it did, and ends with one of the exit codes {codes}"
    return "printed a traceback" if re.search(r'File "[^"]*/cit_scale/[^"]*", line', log) else None


def committed(run_dir: Path) -> dict[int, Path]:
    """Returns step to folder of the committed checkpoints, by folder name alone, without code of the trainer."""
    return {int(path.name[5:]): path for path in (run_dir / "ckpt").glob("step_*") if path.name[5:].isdigit()}


# ---------------------------------------------------------------------------------------------------------------------
# The undisturbed and the disturbed run


def prepare(folder: Path, engine: str, seed: int) -> list[str]:
    """Write the recipe and the teachers' weights to ``folder``. Returns the trainer's arguments.

    The teachers have random weights: the comparison of two runs does not need trained ones.
    """
    # Both runs use a copy of the code, so that an edit of the checkout meanwhile cannot make them differ.
    for name in ("cit_scale", "ds_configs"):
        shutil.copytree(REPOSITORY / name, folder / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    recipe = yaml.safe_load(RECIPE) | {"seed": seed}
    recipe["train"] |= {"save_every_steps": SAVE_EVERY_STEPS, "keep_last": 3}
    torch.manual_seed(seed)
    for name, teacher in recipe["teachers"].items():
        network = build_network(teacher["model"], teacher.get("kwargs", {}), num_classes=10, image_size=16)
        teacher["weights"] = str(folder / f"{name}.safetensors")
        safetensors.torch.save_file(network.model.state_dict(), teacher["weights"])
    (folder / "soak.yaml").write_text(yaml.safe_dump(recipe))
    # Without the last one a GPU sums in an order of its own each time.
    files = [f"--config={folder / 'soak.yaml'}", f"--data.cache_dir={folder / 'cache'}"]
    return [*files, *ENGINES[engine], "--engine.deterministic=true"]


def measure_step_s(job: Job) -> float:
    """Seconds of a step, the mean over 30 steps. Raises Surprise if the trainer does not get that far."""

    def has_done(step: int) -> bool:
        return job.last_step >= step

    times = []
    for step in (10, 40):  # the first ten steps are not timed
        if not job.wait(functools.partial(has_done, step), START_LIMIT_S):
            raise Surprise("the trainer does not run", job.log)
        times.append(time.monotonic())
    return (times[1] - times[0]) / 30


def disturb(
    start_job: Callable[[int], Job],
    faults: Iterator[Fault],
    steps: int,
    startup_s: float,
    step_s: float,
    until_s: float,
) -> Iterator[Start]:
    """Start the run again and again until its ``steps`` steps are done. Yields the record of each start.

    start_job: starts the job of a given number. startup_s, step_s: usual seconds of a start-up and a step.
    until_s: time of the last fault, by time.monotonic(); after it a start runs to the end.
    """
    damaged: set[int] = set()
    newest = 0
    for number in itertools.count():
        left_s = until_s - time.monotonic()
        fault = next(faults) if left_s > 0 else None
        # The mean number of steps between faults with which the run just reaches its end in the time that is left:
        # remaining steps / number of start-ups for which there is time beside the steps.
        mean_steps = (steps - newest) / max(1.0, (left_s - (steps - newest) * step_s) / startup_s)
        with start_job(number) as job:
            start = watch(job, fault, damaged, startup_s, step_s, mean_steps)
        folders = committed(job.run_dir)
        good = folders.keys() - damaged
        newest = start.newest
        # Damage only while an older good checkpoint remains: with none the trainer refuses to start over.
        if fault and fault.damage and not job.is_done and len(good) >= (1 if fault.damage in HARMLESS else 2):
            DAMAGES[fault.damage](folders[newest], random.Random(fault.seed))
            start.damage = fault.damage
            if fault.damage not in HARMLESS:
                damaged.add(newest)
                newest = max(good - damaged)
                start.lost_by_damage = start.newest - newest  # the next start must continue from ``newest``
        yield start
        if job.is_done:
            return


def learned(run_dir: Path) -> dict[str, Any]:
    """Collect everything that a finished run has learned and logged, without times, for a bitwise comparison.

    Returns "file, key" to value. Tensors are (dtype, shape, bytes); metrics are lists of (step, value).
    """
    step, last = max(committed(run_dir).items())
    found: dict[str, Any] = {"steps": step}
    for file in [*last.glob("*.safetensors"), *run_dir.glob("*.safetensors")]:
        for key, tensor in safetensors.torch.load_file(file).items():
            # Bytes, because == treats -0 and 0 as equal, and NaN as different from itself.
            bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{file.relative_to(run_dir)}, {key}"] = tensor.dtype, tensor.shape, bits
    for key, value in json.loads((last / "meta.json").read_text()).items():
        if key not in OWN_META:
            found[f"meta.json, {key}"] = value
    for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        for key in line.keys() - COSTS - {"step"}:
            found.setdefault(f"metrics.jsonl, {key}", []).append((line["step"], line[key]))
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """A line for each key whose values differ, or that only one of the two has. Both are from ``learned``."""
    return [f"different: {key}" for key in {**one, **other} if one.get(key) != other.get(key)]


def excess(starts: Sequence[Start]) -> list[str]:
    """A line for each start that lost too many steps: more than two save intervals by a kill, or any by a request."""
    may_lose = [2 * SAVE_EVERY_STEPS if start.kind in KILLS else 0 for start in starts]
    return [
        f"start {number}, {start}: at most {most} steps may be lost"
        for number, (start, most) in enumerate(zip(starts, may_lose, strict=True))
        if start.lost > most
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Report


def tables(starts: Sequence[Start]) -> str:
    """Two tables in Markdown: one line per kind of fault, and one per kind of damage."""

    def most(lost: list[int]) -> str:
        return str(max(lost, default=""))

    faults, damages = [], []
    for kind in KINDS:
        hit = [start for start in starts if start.kind == kind]
        early, twice = sum(start.in_startup for start in hit), sum(start.second is not None for start in hit)
        codes = ", ".join(sorted({str(start.exit_code) for start in hit}))
        faults.append([kind, str(len(hit)), str(early), str(twice), most([start.lost for start in hit]), codes])
    for damage in DAMAGES:
        lost = [start.lost_by_damage for start in starts if start.damage == damage]
        damages.append([damage, str(len(lost)), most(lost)])
    header = ["fault", "times", "of them in start-up", "with a second signal", "most steps lost", "exit codes"]
    return f"{table(header, faults)}\n\n{table(['damage between starts', 'times', 'most steps lost'], damages)}"


def soak(folder: Path, engine: str, ranks: int, seed: int, minutes: float) -> dict[str, Any]:
    """Run both runs and print the report. Returns the figures as JSON values; ``wrong`` lists what was not good."""
    arguments = prepare(folder, engine, seed)

    def start_job(name: str, epochs: int, number: int = 0) -> Job:
        log = folder / f"{name}_{number:03d}.log"
        return Job(folder / name, [*arguments, f"--train.epochs={epochs}"], ranks, log)

    until_s = time.monotonic() + FAULTS_PART * 60 * minutes
    # A job of its own, with more epochs than it will ever do, is killed once the speed is known.
    with start_job("calibration", 10_000) as job:
        step_s = measure_step_s(job)
    epochs = max(2, round(TRAINING_PART * 60 * minutes / step_s / STEPS_PER_EPOCH))
    steps = epochs * STEPS_PER_EPOCH
    print(f"{steps} steps of {1e3 * step_s:.0f} ms", flush=True)
    with start_job("undisturbed", epochs) as job:
        alone = watch(job, None, set())
    assert alone.startup_s is not None  # it has trained to its end
    starts: list[Start] = []
    restart = functools.partial(start_job, "disturbed", epochs)
    for start in disturb(restart, plan(seed), steps, alone.startup_s, step_s, until_s):
        print(f"start {len(starts)}: {start}", flush=True)
        starts.append(start)

    runs = [folder / name for name in ("undisturbed", "disturbed")]
    expected, found = map(learned, runs)
    wrong = [*differences(expected, found), *excess(starts)]
    goodput = [json.loads((run_dir / "results.json").read_text())["goodput"] for run_dir in runs]
    startup_s = statistics.median(start.startup_s for start in [alone, *starts] if start.startup_s is not None)
    lost = sum(start.lost + start.lost_by_damage for start in starts)
    print(f"\n{machine_text(torch.device('cpu'))}; {engine} on {ranks} ranks, seed {seed}\n\n{tables(starts)}\n")
    print(f"undisturbed: goodput {goodput[0]:.2f}, {alone.seconds:.0f} s")
    print(f"disturbed: goodput {goodput[1]:.2f}, {sum(start.seconds for start in starts):.0f} s, {len(starts)} starts")
    print(f"a start-up takes {startup_s:.0f} s (median); {lost} steps were lost and done again")
    tensors = sum(".safetensors" in key for key in expected)
    compared = f"{tensors} tensors and {len(expected['metrics.jsonl, loss'])} losses after {expected['steps']} steps"
    print("\n".join([f"NOT GOOD, of {compared}:", *wrong[:20]]) if wrong else f"IDENTICAL: {compared}")
    return {
        "step_s": step_s,
        "goodput": goodput,
        "undisturbed": asdict(alone),
        "disturbed": [{**asdict(start), "lost": start.lost} for start in starts],
        "compared": compared,
        "wrong": wrong,
    }


def main() -> int:
    """Run the soak. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="duration of the whole soak (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--engine", choices=ENGINES, default="zero1")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in FOLDER, and keep it")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures to FILE")
    asked = parser.parse_args()
    folder = (asked.keep or Path(tempfile.mkdtemp(prefix="soak_"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if list(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    try:
        record = soak(folder, asked.engine, asked.ranks, asked.seed, asked.minutes)
    except Surprise as surprise:
        message, log = surprise.args
        print("\n".join([*log.read_text(errors="replace").splitlines()[-40:], "", f"SURPRISE: {message}; {log}"]))
        return 1
    if asked.json:
        asked.json.write_text(json.dumps({**vars(asked), **record}, indent=1, default=str) + "\n")
    if record["wrong"]:
        print(f"kept: {folder}")
    elif not asked.keep:
        shutil.rmtree(folder)
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
