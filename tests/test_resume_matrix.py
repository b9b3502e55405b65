"""Every engine on one and two ranks reads what every other wrote, through the files of a checkpoint.

pytest -s tests/test_resume_matrix.py     prints the table
"""

from pathlib import Path

import pytest
from engine_cases import make_engine, update
from ranks import run_on_ranks
from safetensors.torch import load_file

from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.layout import share_out
from cit_scale.checkpoint.store import Retention, load_newest, save
from cit_scale.distributed.world import World

# Rows and columns: an engine, and its number of ranks. plain is for one process.
LAYOUTS = [("plain", 1), *((sharding, ranks) for sharding in ("zero1", "zero2", "zero3", "fsdp2") for ranks in (1, 2))]
STEPS = 3

pytestmark = pytest.mark.fault


@pytest.mark.slow
def test_the_state_is_bitwise_the_same_from_every_engine_to_every_other(tmp_path):
    for ranks in (1, 2):
        run_on_ranks(ranks, train_and_save, shardings_on(ranks), tmp_path)
    for ranks in (1, 2):
        run_on_ranks(ranks, load_and_save, shardings_on(ranks), tmp_path)
    table = {
        (source, target): difference_text(
            saved(tmp_path / name(*source)), saved(tmp_path / f"{name(*source)} {name(*target)}")
        )
        for source in LAYOUTS
        for target in LAYOUTS
    }
    show(table)
    assert set(table.values()) == {"="}
    assert len(table) == 81


def shardings_on(ranks: int) -> list[str]:
    return [sharding for sharding, on in LAYOUTS if on == ranks]


def name(sharding: str, ranks: int) -> str:
    return f"{sharding}x{ranks}"


def train_and_save(world: World, shardings: list[str], folder: Path) -> None:
    for sharding in shardings:
        engine = make_engine(world, sharding, 1, str(folder))
        for step in range(STEPS):
            update(engine, world, step)
        save_engine(engine, folder / name(sharding, world.world_size), world)


def load_and_save(world: World, shardings: list[str], folder: Path) -> None:
    for sharding in shardings:
        for source in LAYOUTS:
            engine = make_engine(world, sharding, 1, str(folder))
            found = load_newest(folder / name(*source), world)
            engine.load_state(found.state)
            save_engine(engine, folder / f"{name(*source)} {name(sharding, world.world_size)}", world)


def save_engine(engine, run_dir: Path, world: World) -> None:
    shares = share_out(engine.state_shapes(), world.world_size)
    save(run_dir, STEPS, engine.state(shares[world.rank]), shares, {}, world, Retention())


def saved(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint's files, whichever file it lies in."""
    files = sorted(checkpoint.path(run_dir, STEPS).glob("*.safetensors"))
    return {
        f"{file.name.split('_0')[0]} {key}": tensor.numpy().tobytes()
        for file in files
        for key, tensor in load_file(file).items()
    }


def difference_text(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    """= for the same bits everywhere, otherwise how many tensors differ."""
    assert any(key.startswith("optimizer exp_avg_sq/") for key in expected)
    different = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    return str(len(different)) if different else "="


def show(table: dict) -> None:
    print("\n| saved by \\ read by | " + " | ".join(name(*target) for target in LAYOUTS) + " |")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    for source in LAYOUTS:
        print(f"| {name(*source)} | " + " | ".join(table[source, target] for target in LAYOUTS) + " |")
