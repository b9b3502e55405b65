"""What stands on the disk is cut, flipped, gone or empty: it is noticed, set aside, and the older one is taken."""

import errno
import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sabotage
from tiny_run import assert_same_end, assert_same_tensors

from cit_scale.checkpoint import store as checkpoint
from cit_scale.checkpoint.store import load_newest
from cit_scale.distributed.world import World
from cit_scale.errors import RefusedError

pytestmark = pytest.mark.fault

FILES = (
    "student.safetensors",
    "student_ema.safetensors",
    "optimizer_000.safetensors",
    "optimizer_001.safetensors",
    "index.json",
    "meta.json",
    "MANIFEST.json",
)


def flip_bit(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ 1 << bit]))


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half of it": lambda path: cut(path, 0.5),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a bit flipped at the beginning": lambda path: flip_bit(path, 3, 0),
    "a bit flipped in the middle": lambda path: flip_bit(path, path.stat().st_size // 2, 5),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "zeros of the same length": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
}


def test_the_checkpoint_has_the_files_that_are_damaged_here(halted):
    assert sorted(path.name for path in halted.checkpoint(8).iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_noticed_and_the_older_checkpoint_taken(damage, halted, tmp_path):
    for file in FILES:
        run = halted.copy(tmp_path / file)
        DAMAGE[damage](run.checkpoint(8) / file)
        found = load_newest(run.run_dir, World())
        assert found is not None
        assert found.step == 4
        assert run.checkpoints() == ["step_000004", "step_000008.broken"]
        shutil.rmtree(run.runs_dir)


def break_the_disk(world, code):
    checkpoint.file_sha256 = functools.partial(sabotage.fail, code)


@pytest.mark.parametrize(("code", "exit_code"), [(errno.EACCES, 3), (errno.EIO, 1), (errno.ENOTCONN, 1)])
def test_a_file_that_cannot_be_read_is_no_damage_and_nothing_is_set_aside(code, exit_code, halted, calm):
    """A disk or a permission may come back; a disk by itself, so that a job is queued again."""
    ended = halted.run(sabotage=(break_the_disk, code))
    assert ended.codes == [exit_code, exit_code], ended.output
    assert ended.output.count("error: checkpoint of step 8 cannot be read") == 1
    assert halted.checkpoints() == ["step_000004", "step_000008"]
    assert "continues after step 8" in halted.finish().outputs[0]
    assert_same_end(halted, calm())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("optimizer_001.safetensors", "a bit flipped in the middle"),
        ("MANIFEST.json", "half of it"),
        ("meta.json", "empty"),
        ("student.safetensors", "missing"),
    ],
)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_older_one(file, damage, halted, calm):
    DAMAGE[damage](halted.checkpoint(8) / file)
    shutil.copytree(halted.checkpoint(4), halted.run_dir / "ckpt" / "step_000012.partial")
    shutil.copytree(halted.checkpoint(4), halted.run_dir / "ckpt" / "step_000002.deleted")
    ended = halted.finish()
    assert "continues after step 4" in ended.outputs[0]
    assert f"checkpoint of step 8 does not verify ({file} " in ended.output or file == "MANIFEST.json"
    assert halted.checkpoints() == ["step_000008", "step_000008.broken", "step_000012"]
    assert_same_end(halted, calm())


def test_no_good_checkpoint_is_no_start_from_the_beginning(halted, calm, tmp_path):
    for step in (4, 8):
        flip_bit(halted.checkpoint(step) / "meta.json", 10, 1)
    files = sorted(path.name for path in halted.run_dir.rglob("*") if path.is_file() and path.suffix != ".yaml")
    for _ in range(2):
        ended = halted.run()
        assert ended.codes == [7, 7], ended.output
        assert "meta.json has another SHA-256" in ended.outputs[0]
        assert "--fresh" in ended.outputs[0]
        assert ended.output.count("error:") == 1
    assert halted.checkpoints() == ["step_000004", "step_000008"]
    assert sorted(path.name for path in halted.run_dir.rglob("*") if path.is_file() and path.suffix != ".yaml") == files
    halted.finish("--fresh")
    assert_same_end(halted, calm())
    assert sorted(path.name for path in (halted.runs_dir / "tiny.1" / "ckpt").glob("step_*")) == [
        "step_000004",
        "step_000008",
    ]


def test_200_of_200_flipped_bits_are_caught(halted):
    shutil.rmtree(halted.checkpoint(4))
    folder = halted.checkpoint(8)
    sizes = {file: (folder / file).stat().st_size for file in FILES}
    generator = random.Random(0)
    # Half of them anywhere, which is in the tensors nearly always; half of them with every file as likely as another.
    anywhere = generator.choices(FILES, weights=sizes.values(), k=100)
    caught = 0
    for file in [*anywhere, *generator.choices(FILES, k=100)]:
        place = folder / file, generator.randrange(sizes[file]), generator.randrange(8)
        flip_bit(*place)
        with pytest.raises(RefusedError, match="none verifies"):
            load_newest(halted.run_dir, World())
        caught += 1
        flip_bit(*place)
    assert caught == 200
    assert load_newest(halted.run_dir, World()).step == 8, "the same checkpoint is good without the flips"


# --- What else stands in the run folder ---


@pytest.mark.parametrize("damage", ["half of it", "empty", "missing", "zeros of the same length", "not utf-8"])
def test_a_damaged_metrics_file_costs_the_damaged_lines_at_most(damage, halted, calm):
    path = halted.run_dir / "metrics.jsonl"
    if damage == "not utf-8":
        flip_bit(path, 30, 7)
    else:
        DAMAGE[damage](path)
    before = path.read_bytes().splitlines() if path.exists() else []
    halted.finish()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps[-4:] == [9, 10, 11, 12]
    assert len(steps) >= 4 + min(7, len(before) - 7)
    assert_same_tensors(halted.run_dir, calm().run_dir)


@pytest.mark.parametrize("file", ["env.json", "config.yaml"])
@pytest.mark.parametrize(
    "damage", ["half of it", "empty", "zeros of the same length", "a bit flipped at the beginning"]
)
def test_a_damaged_note_is_said_in_one_line_or_made_anew(file, damage, halted):
    DAMAGE[damage](halted.run_dir / file)
    ended = halted.run()
    assert "Traceback" not in ended.output, ended.output
    assert ended.code in (0, 7)
    if ended.code == 7:
        assert str(halted.run_dir / file) in ended.outputs[0] or "settings" in ended.outputs[0], ended.outputs[0]


@pytest.mark.parametrize("content", ["5", "null", "[1, 2]", '{"time": 1.0}', '[{"time": "yesterday"}]', "[{}]"])
def test_a_list_of_starts_that_is_something_else_does_not_keep_a_run_from_going_on(content, halted, calm):
    path = halted.run_dir / "env.json"
    path.write_text(content)
    halted.finish()
    assert_same_end(halted, calm())
    kept = json.loads(content)
    if isinstance(kept, list) and all(isinstance(start, dict) for start in kept):
        assert json.loads(path.read_text())[0] == kept[0]
    else:
        assert path.with_name("env.json.1").read_text() == content
        assert len(json.loads(path.read_text())) == 1


@pytest.mark.parametrize("damage", ["half of it", "empty", "missing", "zeros of the same length"])
def test_a_finished_run_without_its_results_measures_them_again(damage, calm, tmp_path):
    run = calm().copy(tmp_path / "runs")
    DAMAGE[damage](run.run_dir / "results.json")
    run.finish()
    assert_same_end(run, calm())
