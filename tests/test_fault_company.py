"""Others on the machine: a second run in the folder, a program on the port, a clock that is wrong."""

import functools
import os
import random
import socket
import time

import pytest
import sabotage
from jobs import Job
from tiny_run import assert_same_end

from cit_scale import train

pytestmark = pytest.mark.fault


def wait_at_most(world, wait_s):
    train.exclusive = functools.partial(train.exclusive, wait_s=wait_s)


def test_a_second_run_in_the_folder_is_refused_and_the_first_undisturbed(tiny_run, calm, tmp_path):
    go = tmp_path / "go"
    first = tiny_run.start(sabotage=(sabotage.at, 0, "batch", 6, wait_for_file, str(go)))
    first.wait_for("step 5/12")
    before = tiny_run.checkpoints()
    second = tiny_run.run(sabotage=(wait_at_most, 0.3))
    assert second.codes == [7, 7], second.output
    assert f"error: {tiny_run.run_dir} is in use by process " in second.outputs[0]
    assert f"on {socket.gethostname()}" in second.outputs[0]
    assert second.output.count("error:") == 1
    fresh = tiny_run.run("--fresh", sabotage=(wait_at_most, 0.3))
    assert fresh.codes == [7, 7], fresh.output
    # What was being written when it was listed has been committed under its own name since.
    assert {name.removesuffix(".partial") for name in before} <= set(tiny_run.checkpoints())
    go.touch()
    ended = first.wait()
    assert ended.codes == [0, 0], ended.output
    assert_same_end(tiny_run, calm())


def wait_for_file(path):
    while not os.path.exists(path):
        time.sleep(0.01)


def test_a_second_run_goes_on_when_the_first_is_killed(tiny_run, calm):
    first = tiny_run.start(sabotage=(sabotage.at, 0, "batch", 6, sabotage.sleep))
    first.wait_for("step 5/12")
    second = tiny_run.start()
    second.wait_for("waiting for process")
    first.kill(0, 9)
    first.wait()
    ended = second.wait()
    assert ended.codes == [0, 0], ended.output
    assert "continues after step 4" in ended.outputs[0]
    assert_same_end(tiny_run, calm())


def test_a_port_in_use_is_one_line_and_exit_code_2(tiny_run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = Job(tiny_run.argv, port=port).wait(60)
    assert ended.code == 2, ended.output
    assert ended.output.count(f"error: port {port} of 127.0.0.1, where the ranks are to meet, is in use") == 1
    assert "Traceback" not in ended.outputs[0]
    assert not tiny_run.run_dir.exists()
    again = Job(tiny_run.argv, port=port).wait()
    assert again.codes == [0, 0], again.output


def test_neither_a_clock_set_back_nor_scrambled_file_times_change_which_checkpoint_is_the_newest(halted, calm):
    generator = random.Random(0)
    for path in halted.runs_dir.rglob("*"):
        os.utime(path, (when := generator.uniform(0, 2e9), when))
    for path in [halted.checkpoint(4), *halted.checkpoint(4).iterdir()]:
        os.utime(path, (4e9, 4e9))
    ended = halted.run(sabotage=(set_clocks,))
    assert ended.codes == [0, 0], ended.output
    assert "continues after step 8" in ended.outputs[0]
    assert_same_end(halted, calm())


def set_clocks(world):
    """Years back, another time on each rank, and back again with each look."""
    start, looks = 1e9 + 1e6 * world.rank, []

    def back() -> float:
        looks.append(True)
        return start - len(looks)

    time.time = back
