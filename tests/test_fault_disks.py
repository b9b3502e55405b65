"""Disks that are full, read-only or gone: training goes on, says so, tries again, and nothing is lost."""

import dataclasses
import errno
import os
import re
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import sabotage
from tiny_run import STEPS, assert_same_end, metrics

from cit_scale.checkpoint import store as checkpoint
from cit_scale.distributed.world import World

pytestmark = pytest.mark.fault


def warnings_of(ended, beginning):
    return [line for line in ended.outputs[0].splitlines() if re.match(rf"tiny +{beginning}", line)]


def fail_once_at_save(rank, step, call, code):
    return (
        sabotage.everything,
        (sabotage.retry_at_once,),
        (sabotage.on_disk_calls, rank, step, sabotage.fail_at, call, code, 1),
        # A busy disk may take longer to fail than four of these steps take: nothing could be tried again in between.
        (sabotage.at, None, "batch", step + 1, until_written, step),
    )


def until_written(step):
    """Wait until this rank's part of the checkpoint is written, or has failed."""
    for thread in threading.enumerate():
        if thread.name == f"checkpoint of step {step}":
            thread.join()


@pytest.mark.parametrize(
    ("layout", "rank", "call", "code"),
    [
        ("zero1", 0, "save_file", errno.ENOSPC),
        ("zero1", 1, "save_file", errno.ENOSPC),
        ("zero1", 1, "fsync", errno.EIO),
        ("zero1", 0, "write_text", errno.ENOSPC),
        ("zero1", 0, "mkdir", errno.EROFS),
        ("zero1", 0, "rename", errno.EROFS),
        ("zero1", 0, "chmod", errno.EPERM),
        ("plain", 0, "save_file", errno.ENOSPC),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_announced_and_tried_again(layout, rank, call, code, tiny_run, calm):
    run = dataclasses.replace(tiny_run, layout=layout)
    ended = run.run(sabotage=fail_once_at_save(rank, 4, call, code))
    assert ended.codes == [0] * run.ranks, ended.output
    (warning,) = warnings_of(ended, "checkpoint of step 4 in ")
    assert os.strerror(code) in warning
    assert "training goes on, and tries again" in warning
    saved = [line["step"] for line in metrics(run.run_dir) if "save_bytes" in line]
    assert saved[0] < 8, "tried again with the next step, not with the next regular checkpoint"
    assert_same_end(run, calm(layout))


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_outdated_checkpoint_that_cannot_be_deleted_is_no_reason_to_doubt_the_new_one(call, tiny_run, calm):
    ended = tiny_run.run(sabotage=(sabotage.on_disk_calls, 0, STEPS, fail_in_retention, call))
    assert ended.codes == [0, 0], ended.output
    assert checkpoint._verify(tiny_run.checkpoint(STEPS), STEPS, World()) is None


def fail_in_retention(number, name, moment, half, call):
    """Past the commit, which is the first rename."""
    sabotage._failures["renames"] = sabotage._failures.get("renames", 0) + (name == "rename" and moment == "after")
    if name == call and moment == "before" and (call == "rmtree" or sabotage._failures["renames"]):
        sabotage.fail(errno.EROFS)


@pytest.mark.parametrize(("rank", "call"), [(1, "save_file"), (0, "write_text")])
def test_a_disk_that_is_full_at_the_last_checkpoint_is_exit_code_6_and_the_older_one_is_good(
    rank, call, tiny_run, calm
):
    ended = tiny_run.run(sabotage=(sabotage.on_disk_calls, rank, STEPS, sabotage.fail_at, call, errno.ENOSPC, 99))
    assert ended.codes == [6, 6], ended.output
    assert ended.output.count("error: checkpoint of step 12") == 1
    assert "Traceback" not in ended.output
    assert tiny_run.checkpoints() == ["step_000004", "step_000008"]
    again = tiny_run.finish()
    assert "continues after step 8" in again.outputs[0]
    assert_same_end(tiny_run, calm())


def test_a_network_disk_that_fails_at_the_last_checkpoint_is_exit_code_1_and_a_queued_job_goes_on(tiny_run, calm):
    ended = tiny_run.run(sabotage=(sabotage.on_disk_calls, 1, STEPS, sabotage.fail_at, "fsync", errno.EREMOTEIO, 99))
    assert ended.codes == [1, 1], ended.output
    assert ended.output.count("error: checkpoint of step 12") == 1
    assert "Traceback" not in ended.output
    tiny_run.finish()
    assert_same_end(tiny_run, calm())


def test_a_disk_that_is_full_when_the_run_is_asked_to_stop_is_exit_code_6(tiny_run, calm):
    ended = tiny_run.run(
        sabotage=(
            sabotage.everything,
            (sabotage.at, 1, "forward", 6, sabotage.send, 15),
            (sabotage.on_disk_calls, 0, 6, sabotage.fail_at, "write_text", errno.ENOSPC, 99),
        )
    )
    assert ended.codes == [6, 6], ended.output
    assert "stopped after" not in ended.output
    assert "continues after step 4" in tiny_run.finish().outputs[0]
    assert_same_end(tiny_run, calm())


@pytest.mark.parametrize(("code", "exit_code"), [(errno.EROFS, 6), (errno.ESTALE, 1)])
def test_nothing_is_written_where_nothing_can_be_at_the_start(code, exit_code, tiny_run):
    ended = tiny_run.run(sabotage=(cannot_write_notes, code))
    assert ended.codes == [exit_code, exit_code], ended.output
    assert ended.output.count("error:") == 1
    assert "Traceback" not in ended.output


def cannot_write_notes(world, code):
    write_text = Path.write_text

    def failing(path, *args, **options):
        if path.name.startswith(("config.yaml", "env.json")):
            sabotage.fail(code, str(path))
        return write_text(path, *args, **options)

    Path.write_text = failing


# --- The real thing ---


def mount(*arguments):
    """As root, or as somebody who may become it."""
    for command in (["mount"], ["sudo", "-n", "mount"]):
        try:
            if subprocess.run([*command, *arguments], capture_output=True).returncode == 0:
                return True
        except FileNotFoundError:
            continue
    return False


def unmount(folder):
    # Lazily: a process that was just killed may still hold a file.
    for command in (["umount", "-l"], ["sudo", "-n", "umount", "-l"]):
        try:
            if subprocess.run([*command, str(folder)], capture_output=True).returncode == 0:
                return
        except FileNotFoundError:
            continue


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, 10 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=10m,mode=777", "tmpfs", str(folder)):
        pytest.skip("may not mount a small disk here")
    yield folder
    unmount(folder)


def test_a_real_disk_that_is_full_for_a_while(small_disk, tiny_run, calm):
    run = dataclasses.replace(tiny_run, runs_dir=small_disk / "runs")
    ended = run.run(
        sabotage=(
            sabotage.everything,
            (sabotage.retry_at_once,),
            (sabotage.at, 0, "batch", 3, fill, str(small_disk), 300_000),
            (sabotage.at, 0, "batch", 9, empty, str(small_disk)),
        )
    )
    assert ended.codes == [0, 0], ended.output
    warnings = warnings_of(ended, "checkpoint of step")
    assert warnings
    assert all("No space left on device" in warning for warning in warnings), warnings
    assert not warnings_of(ended, r"checkpoint of step (9|1\d)")
    assert_same_end(run, calm())


def fill(folder, leave):
    """Leave so many bytes free."""
    state = os.statvfs(folder)
    with open(f"{folder}/filler", "wb") as file:
        file.write(b"\0" * (state.f_bavail * state.f_frsize - leave))


def empty(folder):
    os.unlink(f"{folder}/filler")


def test_a_real_run_folder_that_is_read_only_for_a_while(small_disk, tiny_run, calm):
    run = dataclasses.replace(tiny_run, runs_dir=small_disk / "runs")
    written = [str(run.run_dir / name) for name in ("ckpt", "metrics.jsonl")]
    (run.run_dir / "ckpt").mkdir(parents=True)
    ended = run.run(
        sabotage=(
            sabotage.everything,
            (sabotage.retry_at_once,),
            (sabotage.at, 0, "batch", 3, make_read_only, *written),
            (sabotage.at, 0, "batch", 9, make_writable, *written),
        )
    )
    assert ended.codes == [0, 0], ended.output
    assert len(warnings_of(ended, "metrics cannot be written: .*Read-only file system")) == 1
    assert warnings_of(ended, "checkpoint of step 4 .*Read-only file system")
    assert_same_end(run, calm())


def make_read_only(*paths):
    """Seen through a mount of its own. The file system as a whole has files open for writing, TensorBoard's."""
    for path in paths:
        assert mount("--bind", path, path)
        assert mount("-o", "remount,bind,ro", path)


def make_writable(*paths):
    for path in paths:
        unmount(path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_real_limit_to_the_size_of_files(rank, tiny_run, calm):
    """EFBIG comes out of write itself, in safetensors' Rust as in Python."""
    ended = tiny_run.run(
        sabotage=(
            sabotage.everything,
            (sabotage.retry_at_once,),
            (sabotage.at, rank, "batch", 3, limit_files, 100_000),
            (sabotage.at, rank, "batch", 8, limit_files, resource.RLIM_INFINITY),
        )
    )
    assert ended.codes == [0, 0], ended.output
    (first, *_) = warnings_of(ended, "checkpoint of step 4 in ")
    assert "File too large" in first
    assert_same_end(tiny_run, calm())


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- Metrics ---


def test_a_metrics_file_that_cannot_be_written_is_said_once_and_no_line_is_lost(tiny_run, calm):
    ended = tiny_run.run(
        sabotage=(
            sabotage.everything,
            (sabotage.at, 0, "batch", 3, put_a_folder_in_place_of, str(tiny_run.run_dir / "metrics.jsonl")),
            (sabotage.at, 0, "batch", 9, put_back, str(tiny_run.run_dir / "metrics.jsonl")),
        )
    )
    assert ended.codes == [0, 0], ended.output
    assert len(warnings_of(ended, "metrics cannot be written: .*training goes on")) == 1
    assert_same_end(tiny_run, calm())


def put_a_folder_in_place_of(path):
    os.rename(path, f"{path}.away")
    os.mkdir(path)


def put_back(path):
    os.rmdir(path)
    os.rename(f"{path}.away", path)


def test_a_metrics_file_that_cannot_be_cut_at_the_start_is_cut_later(halted, calm):
    """The lines past the checkpoint, which come again, must not stand there twice."""
    ended = halted.run(sabotage=(full_until_batch, 10))
    assert ended.codes == [0, 0], ended.output
    assert len(warnings_of(ended, "metrics cannot be written")) == 1
    assert_same_end(halted, calm())


def full_until_batch(world, step):
    write_text, is_full = Path.write_text, [True]

    def failing_write_text(path, *args):
        if path.name == "metrics.jsonl.partial" and is_full:
            sabotage.fail(errno.ENOSPC, str(path))
        return write_text(path, *args)

    Path.write_text = failing_write_text
    sabotage.at(world, None, "batch", step, is_full.clear)


def test_curves_that_cannot_be_drawn_change_nothing(tiny_run, calm):
    tiny_run.run_dir.mkdir(parents=True)
    (tiny_run.run_dir / "tensorboard").write_text("a file where the folder should be")
    ended = tiny_run.finish()
    assert len(warnings_of(ended, "metrics cannot be written")) == 1
    assert_same_end(tiny_run, calm())


def test_a_run_folder_that_goes_away_in_the_middle_is_exit_code_6_and_the_run_goes_on_when_it_is_back(tiny_run, calm):
    ended = tiny_run.run(sabotage=(sabotage.at, 0, "batch", 6, put_a_file_in_place_of, str(tiny_run.run_dir)))
    assert ended.codes == [6, 6], ended.output
    assert ended.output.count("error:") == 1  # beside what TensorBoard's thread says of its own end
    tiny_run.run_dir.unlink()
    shutil.move(f"{tiny_run.run_dir}.away", tiny_run.run_dir)
    tiny_run.finish()
    assert_same_end(tiny_run, calm())


def put_a_file_in_place_of(path):
    os.rename(path, f"{path}.away")
    Path(path).write_text("gone")
