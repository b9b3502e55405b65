"""Benchmark of checkpoints: stall of training, time to write, time to verify and load, each against torch.save.

python -m cit_scale.bench.checkpoint
python -m cit_scale.bench.checkpoint --model cit_tiny_patch16_224 --rounds 9 --folder /data/runs

One process with the plain engine, AdamW's moments and a moving average. "torch.save" writes one file in the training
loop, without sync, checksum or rename. "torch.save, synced and summed" adds a sync and a SHA-256, as ours do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cit_scale.bench.measure import machine_text, ratio, spread, table
from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.async_save import AsyncCheckpointer
from cit_scale.checkpoint.store import load_newest
from cit_scale.config import EngineConfig, OptimConfig, RunConfig, TrainConfig
from cit_scale.distributed.world import World
from cit_scale.engines.base import Engine
from cit_scale.engines.build import prepare_engine
from cit_scale.engines.plain import PlainEngine
from cit_scale.files import file_sha256, sync
from cit_scale.models.network import build_network
from cit_scale.text import positive

STALL, WRITE, READ = "ours: training stands", "ours: written", "ours: verified and loaded"
SAVE, SAVE_SYNCED, LOAD = "torch.save", "torch.save, synced and summed", "torch.load and loaded"
PEER_OF = {STALL: SAVE, WRITE: SAVE_SYNCED, READ: LOAD}


def build_engine(model: str) -> Engine:
    """A plain engine with random weights of ``model`` for 1,000 classes and 224 pixels, and a moving average."""
    network = build_network(model, {}, num_classes=1000, image_size=224, teachers=("conv", "inv"))
    config = RunConfig(optim=OptimConfig(ema_decay=0.999), engine=EngineConfig(name="plain"))
    return PlainEngine(network, prepare_engine(config, World()))


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(engine: Engine, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Time every way once per round. Returns way to seconds, one figure per round, and the bytes of a checkpoint.

    One more round than ``rounds`` is run: the first one warms up and is dropped.
    """
    times: dict[str, list[float]] = {way: [] for way in (STALL, WRITE, READ, SAVE, SAVE_SYNCED, LOAD)}
    costs: list[dict[str, float]] = []
    checkpointer = AsyncCheckpointer(
        engine, folder, TrainConfig(), World(), step=0, say=print, report=lambda _, cost: costs.append(dict(cost))
    )
    plain, synced = folder / "plain.pt", folder / "synced.pt"

    def save(file: Path) -> None:
        torch.save(engine.state(engine.state_shapes()), file)

    def save_synced() -> None:
        save(synced)
        sync(synced)
        file_sha256(synced)

    def load() -> None:
        newest = load_newest(folder, World())
        assert newest is not None  # the one that was saved last
        engine.load_state(newest.state)

    # All ways take turns within a round: a disk whose speed drifts affects them alike.
    for turn in range(1, rounds + 2):
        checkpointer.save(turn, {})
        checkpointer.settle(insist=True)  # wait for the thread, and fail if nothing was written
        taken = {
            STALL: costs[-1]["save_stall_s"],
            WRITE: costs[-1]["save_write_s"],
            SAVE: seconds(lambda: save(plain)),
            SAVE_SYNCED: seconds(save_synced),
            READ: seconds(load),
            LOAD: seconds(lambda: engine.load_state(torch.load(plain, weights_only=True))),
        }
        os.sync()  # flush the page cache, so that the next round does not pay for the writes of this one
        for way, taken_s in taken.items() if turn > 1 else ():
            times[way].append(taken_s)
    return times, sum(file.stat().st_size for file in checkpoint.path(folder, turn).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cit_base_patch16_224", help="a CiT (default: cit_base_patch16_224)")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds to take the median of (default: 5)")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_", dir=arguments.folder))
    try:
        times, size = measure(build_engine(arguments.model), folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    print(
        f"{machine_text(torch.device('cpu'))}; {arguments.model} with moments and average, {size / 1e6:.0f} MB; "
        f"median (minimum to maximum) of {arguments.rounds} rounds in turns\n"
    )
    rows = [
        [way, spread(taken), f"{ratio(taken, times[PEER_OF[way]]):.2f} x {PEER_OF[way]}" if way in PEER_OF else ""]
        for way, taken in times.items()
    ]
    print(table(["way", "seconds", "against its peer"], rows))


if __name__ == "__main__":
    main()
