"""What the usual ways to write checkpoints do under faults: DeepSpeed's, torch.distributed.checkpoint, torch.save.

python tests/peers.py
python tests/peers.py --json outcomes.json

Every cell is an experiment with processes on this CPU, joined by gloo, and the program finds its words. Two ranks train
a small network and save after steps 1 and 2; something goes wrong; fresh processes load as their library says, and all
weights, buffers and Adam moments are compared with those that were saved. Bits are flipped, and the step that is not
finite taken, on one rank. DeepSpeed at ZeRO stage 2 follows its file ``latest``, FSDP2 takes its newest folder, DDP has
rank 0 overwrite ``last.pt``.

A kill and a full disk are both a limit on the size of files, at half a shard. There the kernel either ends the process
by a signal that nobody handles (SIGXFSZ, as final as a kill -9), or refuses the write (EFBIG; a full disk says ENOSPC).
For a file that is overwritten that stands for a neighbour who takes the space that its truncation frees.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from cit_scale.bench.measure import machine_text, table

IMAGES = torch.arange(8 * 256.0).sin().view(8, 256)
LABELS = torch.arange(8)
MOMENTS = ("exp_avg", "exp_avg_sq")
TIMEOUT_S = 120

# --- Three trainers, as small as they come ---


class Ddp:
    title = "torch.save (DDP)"
    index = shard = pickled = "last.pt"  # what a load reads first, what the last writer writes, what holds a pickle
    last_writer = 0  # the highest rank that writes

    def __init__(self, weights_only: bool = True) -> None:
        self.weights_only = weights_only
        self.module = _build_network()
        self.forward = nn.parallel.DistributedDataParallel(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters())

    def train_step(self, images: Tensor = IMAGES) -> None:
        cross_entropy(self.forward(images), LABELS).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, step: int) -> None:
        if dist.get_rank() == 0:
            state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": step}
            torch.save(state, folder / "last.pt")

    def load(self, folder: Path, named: int | None = None) -> int:
        """The step to go on from; 0 where there is nothing to load. named: one to take in the place of the newest."""
        if not (folder / "last.pt").exists():
            return 0
        state = torch.load(folder / "last.pt", weights_only=self.weights_only)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def tensors(self) -> dict[str, list[Tensor]]:
        """Collective to read where they are sharded."""
        weights, buffers = list(self.module.parameters()), list(self.module.buffers())
        moments = [self.optimizer.state[weight][name] for weight in weights for name in MOMENTS]
        return {"weights": weights, "buffers": buffers, "moments": moments}


class Fsdp(Ddp):
    title = "torch.distributed.checkpoint (FSDP2)"
    index = pickled = "step_2/.metadata"
    shard = "step_2/__1_0.distcp"
    last_writer = 1

    def __init__(self) -> None:
        self.module = self.forward = fully_shard(_build_network())
        self.optimizer = torch.optim.AdamW(self.module.parameters())

    def save(self, folder: Path, step: int) -> None:
        module, optimizer = get_state_dict(self.module, self.optimizer)
        dcp.save({"module": module, "optimizer": optimizer, "step": step}, checkpoint_id=folder / f"step_{step}")

    def load(self, folder: Path, named: int | None = None) -> int:
        chosen = max(folder.glob(f"step_{named or '*'}"), default=None)
        if chosen is None:
            return 0
        module, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"module": module, "optimizer": optimizer, "step": 0}
        dcp.load(state, checkpoint_id=chosen)
        loaded = {"model_state_dict": state["module"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.module, self.optimizer, **loaded)
        return state["step"]


class Zero(Ddp):
    title = "DeepSpeed"
    index = "latest"
    shard = "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    pickled = "global_step2/mp_rank_00_model_states.pt"
    last_writer = 1

    def __init__(self, stage: int = 2, universal: bool = False) -> None:
        self.module = _build_network()
        self.stage = stage
        config = {
            "train_micro_batch_size_per_gpu": len(IMAGES),
            "zero_optimization": {"stage": stage},
            "checkpoint": {"load_universal": universal},
        }
        optimizer = torch.optim.AdamW(self.module.parameters())
        self.engine, *_ = _deepspeed().initialize(model=self.module, optimizer=optimizer, config=config)

    def train_step(self, images: Tensor = IMAGES) -> None:
        self.engine.backward(cross_entropy(self.engine(images), LABELS))
        self.engine.step()

    def save(self, folder: Path, step: int) -> None:
        self.engine.save_checkpoint(str(folder), client_state={"step": step})

    def load(self, folder: Path, named: int | None = None) -> int:
        path, client_state = self.engine.load_checkpoint(str(folder), tag=named and f"global_step{named}")
        return 0 if path is None else client_state["step"]

    def tensors(self) -> dict[str, list[Tensor]]:
        weights, buffers, utils = list(self.module.parameters()), list(self.module.buffers()), _deepspeed().utils
        if self.stage == 0:
            return {"weights": weights, "buffers": buffers}
        optimizer = self.engine.optimizer  # a load replaces its moments, and the accessors would go on with the old
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
        masters = [utils.safe_get_full_fp32_param(weight) for weight in weights]
        moments = [utils.safe_get_full_optimizer_state(weight, name) for weight in weights for name in MOMENTS]
        return {"weights": weights + masters, "buffers": buffers, "moments": moments}


Build = Callable[[], Ddp]


def _deepspeed() -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read while it is imported
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a C++ compiler would run first
    return deepspeed


def _build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 512))


def _fingerprint(trainer: Ddp) -> dict[str, str]:
    """Collective. A digest of each kind of tensors."""
    digests = {}
    for kind, tensors in trainer.tensors().items():
        whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        digests[kind] = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in whole)).hexdigest()
    return digests


# --- Ranks, each a process of its own ---


class Ending(NamedTuple):
    """how: "returned", "raised", "died" or "hung"; value: what was returned, else the exception or the signal."""

    rank: int
    how: str
    value: Any


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Ending]:
    """``function(*args)`` on every rank of a process group. How they ended: the lost ones first, then by time."""
    context = multiprocessing.get_context("fork")
    ended = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (world_size, Path(folder, "store"), ended, function, args)
        processes = [context.Process(target=_run_rank, args=(rank, *given)) for rank in range(world_size)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT_S
        endings = []
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
                endings.append(Ending(rank, "hung", f"{TIMEOUT_S} s"))
            elif process.exitcode != 0:
                endings.append(Ending(rank, "died", signal.Signals(-process.exitcode).name))
    while not ended.empty():
        endings.append(ended.get())
    return endings


def _run_rank(
    rank: int, world_size: int, store: Path, ended: Any, function: Callable[..., Any], args: Sequence[Any]
) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    timeout = timedelta(seconds=TIMEOUT_S / 2)
    try:
        file_store = dist.FileStore(str(store), world_size)
        dist.init_process_group("gloo", store=file_store, timeout=timeout, world_size=world_size, rank=rank)
        ended.put(Ending(rank, "returned", function(*args)))
    except BaseException as error:  # torch.distributed.checkpoint's own is not an Exception
        last_line = str(error).strip().rpartition("\n")[2]
        ended.put(Ending(rank, "raised", f"{type(error).__name__}: {last_line[:200]}"))
    os._exit(0)


def end_text(endings: Sequence[Ending]) -> str:
    for _, how, value in endings:
        if how != "returned":
            return f"{how} {value.split(':')[0]}"
    return "returned"


def load_text(endings: Sequence[Ending], saved: dict[int, dict[str, str]]) -> str:
    """saved: the fingerprints by step."""
    if (end := end_text(endings)) != "returned":
        return end
    steps = {step for _, _, (step, _) in endings}
    if steps == {0}:
        return "starts from nothing"
    if len(steps) > 1:
        return f"ranks go on from different steps: {sorted(steps)}"
    (step,) = steps
    loaded = [digest for _, _, (_, fingerprint) in endings for digest in fingerprint.items()]
    other = sorted({kind for kind, digest in loaded if digest != saved[step][kind]})
    return f"resumes at step {step}{' with other ' * bool(other)}{' and '.join(other)}"


# --- What goes on ranks ---


def train_and_save(
    build: Build, folder: Path, limit: int | None = None, killed: int | None = None
) -> dict[int, dict[str, str]]:
    """Collective. Fingerprints of what was saved, by step. limit: on the files of the last save; it ends the rank
    killed, or, where none is named, fails the writes of all."""
    trainer = build()
    saved = {}
    for step in (1, 2):
        trainer.train_step()
        saved[step] = _fingerprint(trainer)
        if step == 2 and limit is not None and killed in (None, dist.get_rank()):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN if killed is None else signal.SIG_DFL)
        trainer.save(folder, step)
    return saved


def load(build: Build, folder: Path, named: int | None) -> tuple[int, dict[str, str]]:
    """Collective. The step, 0 for none, and the fingerprint of what was loaded."""
    trainer = build()
    step = trainer.load(folder, named)
    return step, _fingerprint(trainer) if step else {}


def load_flipped(build: Build, folder: Path, flips: int, seed: int, verdicts: Path) -> None:
    trainer = build()
    trainer.train_step()
    trainer.save(folder, 1)

    def load_again() -> tuple[int, dict[str, str]]:
        trainer.train_step()  # away from what is loaded
        return trainer.load(folder), _fingerprint(trainer)

    judge_flips(load_again, [path for path in folder.rglob("*") if path.is_file()], flips, seed, verdicts)


def judge_flips(read: Callable[[], Any], files: Iterable[Path], flips: int, seed: int, verdicts: Path) -> None:
    """Flip bits, each alone and anywhere in the files, and write a line for each: ``read`` noticed it by an exception,
    silently returned something else, or the same as ever. Goes on after the lines that there are."""
    intact = read()
    files = sorted(files)
    draws = random.Random(seed)
    chosen = draws.choices(files, [path.stat().st_size for path in files], k=flips)
    places = [(path, draws.randrange(path.stat().st_size), draws.randrange(8)) for path in chosen]
    for place in places[len(verdicts.read_text().splitlines()) :]:
        _flip(*place)
        try:
            verdict = "without effect" if read() == intact else "silent"
        except BaseException:
            verdict = "noticed"
        _flip(*place)
        with verdicts.open("a") as file:
            file.write(f"{verdict}\n")
    if read() != intact:
        raise RuntimeError("two loads of the intact checkpoint differ, so no flip can be judged")


def _flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def step_on_nan(build: Build) -> str:
    """Collective. What a step on images that are not finite does to weights and buffers."""
    trainer = build()
    trainer.train_step()
    before = _fingerprint(trainer)
    trainer.train_step(IMAGES * torch.nan)
    after = _fingerprint(trainer)
    finite = {name: all(t.isfinite().all() for t in trainer.tensors()[name]) for name in ("weights", "buffers")}
    words = {name: "kept" if after[name] == before[name] else "changed" if finite[name] else "NaN" for name in finite}
    return ", ".join(f"{name} {word}" for name, word in words.items())


# --- Faults, each on a copy of the checkpoints of steps 1 and 2 ---


@dataclass
class Bench:
    kind: type[Ddp]
    saved: dict[int, dict[str, str]]
    flips: int
    seed: int
    endings: list[Ending] = field(default_factory=list)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Ending]:
        endings = run_ranks(world_size, function, *args)
        self.endings += endings
        return endings

    def load(self, folder: Path, ranks: int = 2, build: Build | None = None, named: int | None = None) -> str:
        return load_text(self.run(ranks, load, build or self.kind, folder, named), self.saved)


def break_save(kills: bool, bench: Bench, folder: Path) -> str:
    limit = (folder / bench.kind.shard).stat().st_size // 2
    _empty(folder)
    endings = bench.run(2, train_and_save, bench.kind, folder, limit, bench.kind.last_writer if kills else None)
    newest, older = bench.load(folder), bench.load(folder, named=1)
    by_name = f"; load of step 1 by its name: {older}" if older != newest else ""
    return f"save: {end_text(endings)}; load: {newest}{by_name}"


def damage(part: str, change: Callable[[Path], Any], bench: Bench, folder: Path) -> str:
    change(folder / getattr(bench.kind, part))
    return bench.load(folder)


def flip_bits(bench: Bench, folder: Path) -> str:
    verdicts, checkpoint = folder / "verdicts", folder / "checkpoint"
    verdicts.touch()
    checkpoint.mkdir()
    while (
        end := bench.run(1, load_flipped, bench.kind, checkpoint, bench.flips, bench.seed, verdicts)[0]
    ).how == "died":
        with verdicts.open("a") as file:
            file.write("ended the process\n")
        _empty(checkpoint)
    if end.how != "returned":
        return end_text([end])
    counts = Counter(verdicts.read_text().splitlines())
    kinds = ("noticed", "ended the process", "silent", "without effect")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])


@dataclass
class Planted:
    mark: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.mark), 0o777, True)


def plant(bench: Bench, folder: Path) -> str:
    path, planted = folder / bench.kind.pickled, Planted(folder / "mark")
    if bench.kind is Fsdp:
        metadata = pickle.loads(path.read_bytes())
        metadata.note = planted
        path.write_bytes(pickle.dumps(metadata))
    else:
        torch.save({**torch.load(path, weights_only=False), "note": planted}, path)

    def load(build: Build) -> str:
        end = bench.load(folder, build=build)
        return f"{'runs' if planted.mark.exists() else 'does not run'} (load: {end})"

    return load(Ddp) + f", weights_only=False: {load(partial(Ddp, False))}" if bench.kind is Ddp else load(bench.kind)


def load_on_one(bench: Bench, folder: Path) -> str:
    end = bench.load(folder, ranks=1)
    if bench.kind is not Zero:
        return end
    universal = folder / "universal"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder / "global_step2"), "--output_folder", str(universal / "global_step2")]
    subprocess.run([*command, *folders], check=True, capture_output=True)
    return f"{end}; Universal Checkpoint: {bench.load(universal, 1, partial(Zero, universal=True))}"


def poison(bench: Bench, folder: Path) -> str:
    if bench.kind is not Zero:
        return bench.run(1, step_on_nan, bench.kind)[0].value
    ends = [bench.run(1, step_on_nan, partial(Zero, stage))[0].value for stage in (0, 2)]
    return f"ZeRO 0: {ends[0]}; ZeRO 2: {ends[1]}"


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


FAULTS: dict[str, Callable[[Bench, Path], str]] = {
    "none": Bench.load,
    "a rank killed half-way through its file of the last save": partial(break_save, True),
    "disk full half-way through the last save": partial(break_save, False),
    "the last rank's file missing": partial(damage, "shard", Path.unlink),
    "`latest`, `.metadata`, `last.pt` empty": partial(damage, "index", lambda path: os.truncate(path, 0)),
    "`latest`, `.metadata`, `last.pt` missing": partial(damage, "index", Path.unlink),
    "single flipped bits": flip_bits,
    "an object planted in a pickle": plant,
    "saved by 2 ranks, loaded by 1": load_on_one,
    "a step on images that are NaN": poison,
}


def measure(kind: type[Ddp], flips: int, seed: int) -> dict[str, dict[str, Any]]:
    """By fault: what came of it, and how all ranks ended."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as intact:
        endings = run_ranks(2, train_and_save, kind, Path(intact))
        assert all(ending.how == "returned" for ending in endings), endings
        for fault, experiment in FAULTS.items():
            bench = Bench(kind, endings[0].value, flips, seed)
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(intact, copy, dirs_exist_ok=True)
                outcomes[fault] = {"outcome": experiment(bench, Path(copy)), "endings": bench.endings}
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="of one bit each (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the flips' places (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the outcomes, with every rank's ending")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _deepspeed()  # here once, because every rank is a fork of this process
    outcomes = {kind.title: measure(kind, arguments.flips, arguments.seed) for kind in (Zero, Fsdp, Ddp)}
    about = f"{machine_text(torch.device('cpu'))}, deepspeed {version('deepspeed')}"
    print(f"{about}; 2 ranks, {arguments.flips} bits flipped, seed {arguments.seed}\n")
    rows = [[fault, *(found[fault]["outcome"] for found in outcomes.values())] for fault in FAULTS]
    print(table(["fault", *outcomes], rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, "outcomes": outcomes}, indent=1))


if __name__ == "__main__":
    main()
