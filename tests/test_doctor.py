"""The doctor: each check finds a planted fault and says the way out, whatever happens to its process, and what differs
between nodes is named. Checks of a GPU are given stand-ins: none has run on one.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from cit_scale.bench.fidelity import Errors
from cit_scale.bench.involution import Way, by_autograd
from cit_scale.bench.step_ways import OurStep
from cit_scale.config import REPOSITORY
from cit_scale.data import dali
from cit_scale.distributed.world import World
from cit_scale.doctor import (
    collectives,
    compare,
    compilers,
    disk,
    engines,
    examine,
    gpus,
    jpegs,
    kernels,
    machine,
    memory,
    packages,
    pixels,
    precision,
    ranks,
    show,
    step,
    stream,
)
from cit_scale.doctor.findings import Asked, Finding, failed, not_here, ok, worst
from cit_scale.doctor.ranks import Heard
from cit_scale.models import involution_loop
from cit_scale.models.involution import involution

CPU = torch.device("cpu")
GIB = 2**30


def assert_says(finding, status, *words):
    assert finding.status == status, finding
    text = f"{finding.says} {finding.advice}"
    assert all(word in text for word in words), text
    assert (finding.advice != "") == (status in ("warning", "failed"))


# ---------------------------------------------------------------------------------------------------------------------
# The checks, one by one: what is found here, and what of a planted fault


def test_what_is_little_of_a_machine_is_named():
    assert_says(machine.check(Asked()), "ok", f"{len(os.sched_getaffinity(0))} cores", sys.version.split()[0])
    assert machine.check(Asked()).figures["memory_gib"] > 1
    found = machine.judge(2, 2.0, 0.0625, 256)
    assert_says(found, "warning", "2.0 GiB", "--shm-size=8g", "ulimit -n 1024")
    assert_says(machine.judge(2, 8.0, 8.0, resource.RLIM_INFINITY), "ok", "any number of open files")


@pytest.mark.parametrize(
    ("lines", "file"),
    [
        ("0::/system/job_7/step_0\n", "sys/fs/cgroup/system/job_7/memory.max"),
        ("9:cpu:/x\n4:memory:/slurm/job_7\n", "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes"),
    ],
)
def test_memory_is_what_the_control_group_leaves(tmp_path, lines, file):
    assert machine.memory_bytes(tmp_path) > GIB  # without one: the machine's
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    limit = tmp_path / file
    limit.parent.mkdir(parents=True)
    limit.write_text("max\n")
    assert machine.memory_bytes(tmp_path) > GIB
    limit.write_text(f"{GIB}\n")
    assert machine.memory_bytes(tmp_path) == GIB


def test_packages_that_are_missing_or_old_are_named(tmp_path, monkeypatch):
    assert_says(packages.check(Asked()), "ok", f"torch {torch.__version__.split('+')[0]}")
    required = ["numpy>=999", "no-such-package>=2", "torch>=2", 'scipy>=999; extra == "test"', "nvidia-dali-cuda999>=1"]
    found = packages.compare(required)
    assert_says(
        found, "failed", f"numpy {np.__version__}, asked for >=999", "no-such-package is missing", "pip install"
    )
    assert "scipy" not in found.says
    for number, version in enumerate(("3.0", "1.0")):  # Python imports the first
        info = tmp_path / str(number) / "planted-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: planted\nVersion: {version}\n")
    (tmp_path / "0" / "left.dist-info").mkdir()  # by an uninstallation
    monkeypatch.setattr(sys, "path", [str(tmp_path / "0"), str(tmp_path / "1"), *sys.path])
    assert packages.compare(["planted>=2"]).status == "ok"
    assert "dali" not in found.says  # the build for another CUDA does


def test_a_package_that_is_there_and_broken_is_named(tmp_path, monkeypatch):
    (tmp_path / "planted_broken.py").write_text("raise RuntimeError('operator planted::nms\\ndoes not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "IMPORTED", ("torchvision", "planted_broken", "planted_gone"))
    found = packages.check(Asked())
    assert_says(found, "failed", "RuntimeError: operator planted::nms does not exist; planted_gone cannot be imported")
    assert "torchvision cannot" not in found.says


def test_compilers_that_are_missing_or_broken_are_named(tmp_path):
    found = compilers.check(Asked())
    assert_says(found, "ok", "Python.h")
    assert re.search(r"\d+\.\d+", found.facts["C++"])
    assert found.facts["C"] in found.says
    headers, nowhere = compilers.python_headers(), {"PATH": str(tmp_path)}
    assert_says(compilers.judge(nowhere, headers, has_gpu=False), "warning", "no C++ compiler", "torch.compile", "g++")
    assert compilers.version_of("nvc++", ("g++",), nowhere) == "nvc++"  # named by the user, and not there
    assert_says(compilers.judge(nowhere, headers, has_gpu=True), "failed", "Triton", "install gcc")
    broken = {**os.environ, "CXX": "false", "CC": "false"}
    assert_says(compilers.judge(broken, headers, has_gpu=False), "warning", "false does not work", "CXX")
    assert_says(compilers.judge(broken, headers, has_gpu=True), "failed", "does not work", "CC")
    assert_says(compilers.judge(os.environ, tmp_path, has_gpu=False), "warning", "no", "Python.h", "python3-dev")


H100 = gpus.Gpu("NVIDIA H100", "90", 80.0, 79.0)
BUILT_FOR = ("sm_80", "sm_90", "compute_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_the_check_of_gpus_does_not_apply(monkeypatch):
    found = gpus.check(Asked())
    assert_says(found, "n/a", "none", "no NVIDIA driver")
    assert found.facts["gpus"] == "0"  # so that a node with GPUs differs
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert_says(gpus.check(Asked()), "failed", "Slurm promises 8 GPUs, PyTorch sees 0", "--exclude")


def test_gpus_without_a_driver_are_counted(tmp_path):
    for name, kind, vendor in (("0", "0x030200", "0x10de"), ("1", "0x030000", "0x1002"), ("2", "0x020000", "0x10de")):
        device = tmp_path / "bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "class").write_text(f"{kind}\n")
        (device / "vendor").write_text(f"{vendor}\n")
    assert gpus.count_plugged_in(tmp_path) == 1  # neither another vendor's nor a network card
    found = gpus.judge([], (), "no driver", has_driver=False, plugged_in=1)
    assert_says(found, "warning", "1 are plugged in", "install NVIDIA's driver", "--gpus all")


def test_the_device_that_is_worst_off_is_named():
    found = {f"cuda:{i}": ok("well", figures={"speed": speed}) for i, speed in enumerate((5.0, 3.0, 4.0))}
    assert worst(found).says == "cuda:1, slowest or worst of 3: well"
    assert worst({"cpu": found["cuda:0"]}).says == "well"
    found["cuda:2"] = failed("broken", "mend it")
    assert_says(worst(found), "failed", "cuda:2", "broken")


def test_a_gpu_that_is_slow_in_one_way_is_the_worst_and_each_figure_is_the_lowest():
    slow = ok("slow", figures={"copy": 1000.0, "link": 25.1})
    found = {"cuda:0": slow} | {f"cuda:{i}": ok("well", figures={"copy": 3000.0, "link": 25.0}) for i in (1, 2)}
    assert_says(worst(found), "ok", "cuda:0, slowest or worst of 3: slow")
    assert worst(found).figures == {"copy": 1000.0, "link": 25.0}


def test_gpus_that_cannot_be_used_are_named():
    assert_says(gpus.judge([H100] * 8, BUILT_FOR, "CUDA", has_driver=True), "ok", "8: NVIDIA H100 80 GiB")
    assert_says(gpus.judge([], (), "CUDA 13", has_driver=True), "failed", "PyTorch sees none", "CUDA_VISIBLE_DEVICES")
    wrong = gpus.Gpu("NVIDIA H100", "90", 80.0, 79.0, "the sum of 0 to 999 came out as 7, not 499500")
    assert_says(
        gpus.judge([H100, wrong], BUILT_FOR, "CUDA", has_driver=True), "failed", "1 (NVIDIA H100)", "came out as 7"
    )
    gone = gpus.Gpu("GPU 0", "", 0.0, 0.0, "system not yet initialized")
    found = gpus.judge([gone] * 8, BUILT_FOR, "CUDA", has_driver=True)
    assert_says(found, "failed", "8: GPU 0; CUDA; none of them computes: system not", "nvidia-fabricmanager")
    found = gpus.judge([H100] * 7, BUILT_FOR, "CUDA", has_driver=True, plugged_in=8)
    assert_says(found, "warning", "8 are plugged in, and PyTorch sees 7", "dmesg")
    old = gpus.Gpu("Tesla V100", "70", 16.0, 16.0)
    assert_says(gpus.judge([H100, old], BUILT_FOR, "CUDA", has_driver=True), "failed", "no code for sm_70")
    used = gpus.Gpu("NVIDIA H100", "90", 80.0, 30.0)
    assert_says(
        gpus.judge([H100, used], BUILT_FOR, "CUDA", has_driver=True), "warning", "1 (30 GiB free)", "nvidia-smi"
    )


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ("86", ["sm_80"], True),  # a binary of the same major version
        ("90", ["sm_80"], False),
        ("90", ["compute_80"], True),  # compiled when it is loaded
        ("80", ["sm_86"], False),
        ("100", ["sm_90", "sm_100"], True),
        ("90", ["sm_90a"], True),
        ("90", ["unknown"], False),
    ],
)
def test_code_runs_on_the_architectures_for_which_it_was_built(capability, built_for, runs):
    assert gpus.runs_on(capability, built_for) is runs


def test_a_slow_link_to_the_gpu_is_a_warning():
    found = memory.check(Asked())
    assert_says(found, "ok", "GB/s")
    assert found.figures["copy_gb_per_s"] > 0.1
    assert_says(memory.judge(3000.0, 1.5), "warning", "1.5 GB/s to it", "nvidia-smi -q, under PCI")


def test_ranks_add_up():
    # Not forks of this process, in which another test may have left a process group.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(collectives.check, Asked(found={"GPUs": not_here("none")})).result()
    assert_says(found, "ok", "gloo, 2 ranks: the sum is right")
    assert found.figures["sum_gb_per_s"] > 0


# The ranks are forks: what is planted here is planted there.
def planted_sum(world, store):
    return "a sum of ones over 2 ranks came out as 1" if world.rank else None


def sum_found(backend):
    return collectives.judge(collectives.run_ranks(2, collectives.add_up, 3.0), backend)


def test_a_wrong_sum_a_dead_and_a_hanging_rank_are_named(monkeypatch):
    monkeypatch.setattr(collectives, "time_sum", lambda world: 1.0)
    monkeypatch.setattr(collectives, "sum_ones", planted_sum)
    assert_says(sum_found("nccl"), "failed", "rank 1: RuntimeError: a sum", "came out as 1", "NCCL")
    monkeypatch.setattr(collectives, "sum_ones", lambda world, store: os._exit(3) if world.rank else None)
    assert_says(sum_found("gloo"), "failed", "rank 1: its process died", "GLOO")
    monkeypatch.setattr(collectives, "sum_ones", lambda world, store: time.sleep(60))
    assert_says(sum_found("gloo"), "failed", "rank 0: no answer within 3 s", "rank 1: no answer within 3 s")
    assert not multiprocessing.active_children()


def test_wrong_values_in_a_large_sum_are_counted(monkeypatch):
    def all_reduce(values):
        values.fill_(0)
        values[:5] = 7

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(RuntimeError, match="5 wrong values of"):
        collectives.time_sum(World())


def leave_or_wait(world, store, say):
    say(world.rank)
    if world.rank:
        sys.exit("no device")
    time.sleep(60)


def test_the_other_ranks_of_one_with_a_problem_are_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(ranks, "AFTER_S", 1.0)
    start = time.monotonic()
    first, second = ranks.run_ranks(2, leave_or_wait, 50.0)
    assert time.monotonic() - start < 25
    assert first.said == [0]
    assert first.problem.startswith("no answer within")
    assert second == Heard([1], "SystemExit: no device")
    assert "in leave_or_wait" in capfd.readouterr().err  # where the first one waits


def test_ranks_start_from_a_process_that_is_going_to_print_its_own_stack(monkeypatch):
    """As a check's does. What that is planned with does not survive a fork, and waits there for its thread."""
    monkeypatch.setattr(examine, "WHOLE_S", 60.0)
    (found,) = examine.examine(Asked(), [each for each in examine.CHECKS if each.name == "collectives"])
    assert_says(found.finding, "ok", "2 ranks")


def test_matrix_products_that_are_off_or_slow_are_named(monkeypatch):
    found = precision.check(Asked())
    assert_says(found, "ok", "TFLOP/s", "precision auto is")
    assert set(found.figures) == {"float32_tflops", "bf16_tflops"}
    right = torch.mm
    monkeypatch.setattr(torch, "mm", lambda left, right_side: right(left, right_side) * 1.001)
    assert_says(precision.check(Asked()), "failed", "off by float32 1.0e-03", "NVIDIA_TF32_OVERRIDE")
    peaks = {"float32": 67e12, "bf16": 989e12}
    products = {"float32": precision.Product(1e-7, 50e12), "bf16": precision.Product(1e-3, 100e12)}
    assert_says(precision.judge(products, peaks, "bf16"), "warning", "bf16 at 10% of its peak", "nvidia-smi")
    products["bf16"] = precision.Product(float("nan"), 600e12)
    assert_says(precision.judge(products, peaks, "bf16"), "failed", "bf16 nan")


def test_the_involution_of_this_machine_is_right():
    assert_says(kernels.check(Asked()), "ok", "involution_cpu: output and gradients")


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_an_involution_that_returns_other_values_is_found(value):
    """The stand-in for Triton's kernels on a GPU is wrong where the stride is 2, and in its gradients."""

    def wrong(x, kernel, stride=1):
        return involution(x, kernel, stride) * (value if stride == 2 else 1.0)

    found = kernels.compare(Way(wrong, by_autograd(wrong)), CPU)
    assert len(found) == 3 * 2  # output and gradients, in both dtypes, in the one case of stride 2
    assert all("stride 2" in each for each in found)
    assert_says(
        kernels.judge("involution_triton", found, 1.0, is_slow=False), "failed", "involution_triton", "~/.triton"
    )


def test_the_slow_loop_is_a_warning(monkeypatch):
    monkeypatch.setattr(kernels, "implementation", lambda device_type, dtype: involution_loop)
    assert_says(kernels.check(Asked()), "warning", "several times slower", "compilers")


def test_the_decoder_of_this_machine_gives_the_same_bytes_each_time():
    assert_says(jpegs.check(Asked(quick=True)), "ok", "the same bytes", "PIL 0.000 of 255")


@pytest.fixture(scope="module")
def two_batches():
    return [[jpegs.to_jpeg(jpegs.photo(jpegs.SIZE, jpegs.SIZE, first + i)) for i in range(2)] for first in (0, 2)]


def standing_in(batches, *, swapped_at=None, brighter=0):
    """A GPU's decoder that gives the images of the other batch at one of its turns, as if written over."""
    right = [next(decoded) for decoded in [jpegs.decode(batches, 0.0, CPU)] for _ in range(2)]
    for turn in itertools.count():
        yield (right[(turn + (turn == swapped_at)) % 2].int() + brighter).clamp(0, 255).byte()


def test_a_decoder_that_mixes_up_its_batches_once_is_found(two_batches):
    loads = {0.0: None, 0.65: 7, 1.0: None}
    found = {load: jpegs.compare(standing_in(two_batches, swapped_at=at), two_batches, 5) for load, at in loads.items()}
    assert {load: count for load, (count, _) in found.items()} == {0.0: 0, 0.65: 1, 1.0: 0}
    judged = jpegs.judge(found, 2, 5, "cuda")
    assert_says(judged, "warning", "1 of 8 batches have other bytes than before at hw_decoder_load=0.65", "at 0")
    found[0.0] = jpegs.compare(standing_in(two_batches, swapped_at=3), two_batches, 5)
    assert_says(jpegs.judge(found, 2, 5, "cuda"), "failed", "at hw_decoder_load=0;", "another version of nvidia-dali")


def test_a_decoder_that_is_far_from_pil_is_found(two_batches):
    found = {0.0: jpegs.compare(standing_in(two_batches, brighter=3), two_batches, 2)}
    assert_says(jpegs.judge(found, 2, 2, "cuda"), "failed", "of 255 from PIL")
    near = {0.0: jpegs.compare(standing_in(two_batches), two_batches, 2)}
    assert_says(jpegs.judge(near, 2, 2, "cuda"), "ok", "0.000 at hw_decoder_load=0 of 255")
    assert_says(jpegs.judge({0.0: (0, 1.4)}, 2, 2, "cuda"), "ok", "1.400")  # nvJPEG rounds otherwise
    assert_says(jpegs.judge({0.0: (0, 0.4)}, 2, 2, "cpu"), "failed", "0.40 of 255 from PIL")


@pytest.mark.slow
def test_an_operation_that_computes_otherwise_than_pil_is_named(monkeypatch):
    assert_says(pixels.check(Asked()), "ok", "comparisons are within their limits")
    planted = [dali._identity if branch is dali._posterize else branch for branch in dali.BRANCHES]
    monkeypatch.setattr(dali, "BRANCHES", planted)
    found = pixels.check(Asked())
    assert_says(found, "failed", "posterize", "allowed 1.0", "bench.fidelity")
    assert "brightness" not in found.says


def test_what_breaks_a_limit_is_named_and_what_has_none_is_not():
    near, far = np.full(4, 0.3), np.full(4, 7.0)
    found = {"crop": Errors(near, near, 0.5), "blur": Errors(far, far), "rotate 3": Errors(far, far, 1.0)}
    assert_says(pixels.judge(found), "failed", "rotate 3 7.00, allowed 1.0")
    assert "blur" not in pixels.judge(found).says
    del found["rotate 3"]
    assert_says(pixels.judge(found), "ok", "1 comparisons", "crop, 0.30")


class PlantedStep(OurStep):
    """ZeRO-2 learns something else, ZeRO-3 fails."""

    def __init__(self, prepared, teachers, *batches):
        if prepared.config.engine.ds_config == "zero3" and prepared.config.engine.name == "zero":
            raise RuntimeError("no such operator:\n zero3")
        if prepared.config.engine.ds_config == "zero2":
            batches = [dataclasses.replace(each, images=each.images * 0.5) for each in batches]
        super().__init__(prepared, teachers, *batches)


class LonelyStep(OurStep):
    """One rank fails when it comes to ZeRO-1, and says so, while the others wait for it."""

    def __init__(self, prepared, teachers, *batches):
        engine = prepared.config.engine
        if (engine.name, engine.ds_config, prepared.world.rank) == ("zero", "zero1", 1):
            raise RuntimeError("out of memory")
        super().__init__(prepared, teachers, *batches)


class DyingStep(OurStep):
    """One rank dies when it comes to FSDP2."""

    def __init__(self, prepared, teachers, *batches):
        if prepared.config.engine.name == "fsdp2" and prepared.world.rank == 1:
            os._exit(3)
        super().__init__(prepared, teachers, *batches)


def engines_found(planted):
    """What is found by forks of another process than this one, in which a test may have left a process group."""
    engines.OurStep, engines.LIMIT_S = planted, 60.0
    return engines.check(Asked())


@pytest.mark.slow
@pytest.mark.parametrize("step", [PlantedStep, LonelyStep, DyingStep, OurStep])
def test_an_engine_that_learns_something_else_or_fails_is_named(step):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(engines_found, step).result()
    if step is PlantedStep:
        assert_says(found, "failed", "zero2: gradient norms", "zero3: RuntimeError: no such operator: zero3")
        assert found.advice.endswith("--engine.ds_config zero0 or --engine.ds_config zero1")
    elif step is LonelyStep:
        assert_says(found, "failed", "zero1 on rank 1: RuntimeError: out of memory", "zero1 on rank 0: ")
        assert found.advice.endswith("--engine.name fsdp2 or --engine.ds_config zero0")
    elif step is DyingStep:
        assert_says(found, "failed", "fsdp2 on rank 1: its process died", "docs/measurements/versions.md")
        assert "until then" not in found.advice  # nothing else was tried on several ranks
    else:
        assert_says(found, "ok", "plain, fsdp2, zero0, zero1, zero2, zero3: 2 steps on 2 ranks")


def test_a_failure_of_the_plain_engine_is_not_held_against_the_others():
    found = engines.judge({"plain": {0: "RuntimeError: out of memory"}, "zero1": {0: [1.0, 2.0]}}, 1)
    assert_says(found, "failed", "plain: RuntimeError: out of memory", "zero1")
    plain = {0: [1.0, 2.0]}
    assert_says(
        engines.judge({"plain": plain, "zero1": {0: [1.0, float("nan")]}}, 1), "failed", "zero1: gradient", "nan"
    )
    assert_says(
        engines.judge({"plain": plain, "zero1": {0: [1.0, 2.001], 1: [1.0, 2.1]}}, 2),
        "failed",
        "zero1 on rank 1: gradient norms 1 and 2.1, of plain 1 and 2",
    )
    assert_says(engines.judge({"plain": plain, "zero1": {0: [1.0, 2.001], 1: [1.0, 2.0]}}, 2), "ok")


def test_an_engine_that_fails_on_one_rank_is_named_and_later_ones_were_not_tried():
    norms, alone = [1.0, 2.0], "RuntimeError: out of memory"
    heard = [Heard([("plain", norms), ("fsdp2", norms)], "no answer within 9 s"), Heard([("fsdp2", norms)], None)]
    heard[1].said.append(("zero0", alone))
    found = engines.by_engine(heard)
    assert list(found) == ["plain", "fsdp2", "zero0"]
    assert_says(
        engines.judge(found, 2),
        "failed",
        "zero0 on rank 0: no answer within 9 s, zero0 on rank 1: RuntimeError: out of memory",
        "until then train with --engine.name fsdp2",
    )
    # A rank that dies when it has said all has done its work.
    said = [(engine, norms) for engine in engines.ENGINES]
    assert_says(engines.judge(engines.by_engine([Heard(said, "its process died")]), 1), "ok", "on 1 rank")
    assert engines.by_engine([Heard([], alone), Heard([], None)]) == {"plain": {0: alone}}


def test_engines_are_not_tried_where_ranks_cannot_add_up():
    found = engines.check(Asked(found={"collectives": failed("NCCL", "try")}))
    assert_says(found, "n/a", "see their row")


def test_the_lock_is_asked_of_a_file_that_may_be_written(tmp_path, monkeypatch):
    """Of another NFS gives none."""

    def flock(file, how):
        assert disk.fcntl.fcntl(file, disk.fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR

    monkeypatch.setattr(disk.fcntl, "flock", flock)
    assert_says(disk.check(Asked(quick=True, runs_dir=tmp_path)), "ok")


def test_the_disk_is_written_and_left_as_it_was(tmp_path):
    found = disk.check(Asked(quick=True, runs_dir=tmp_path / "runs" / "deeper"))
    assert_says(found, "ok", f"{tmp_path} ({tmp_path}/runs/deeper is not there yet): ", "GB free")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_has_no_locks_or_no_room_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert_says(disk.check(Asked(quick=True, runs_dir=tmp_path / "file")), "failed", "cannot be written", "--runs_dir")

    (tmp_path / "gone").symlink_to(tmp_path / "not mounted" / "runs")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        found = disk.check(Asked(quick=True, runs_dir=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_says(found, "failed", "File too large", "ulimit -f")
    found = disk.check(Asked(quick=True, runs_dir=tmp_path / "gone" / "runs"))
    assert_says(found, "failed", f"{tmp_path}/gone (", "/runs is not there yet) cannot be written")

    def no_locks(file, operation):
        raise OSError(37, "No locks available")

    with monkeypatch.context() as planted:
        planted.setattr(disk.fcntl, "flock", no_locks)
        assert_says(disk.check(Asked(quick=True, runs_dir=tmp_path)), "warning", "No locks available", "two jobs")
    found = disk.judge(tmp_path, 5e6, 1e9, None)
    assert_says(found, "warning", "5 MB/s", "make room", "save_every_steps")
    assert "MB/s" not in disk.judge(tmp_path, 5e6, 1e11, None, is_timed=False).says


@pytest.mark.slow
def test_images_are_counted_and_looked_at():
    found = stream.check(Asked())
    assert_says(found, "ok", "images/s of 500 x 375 pixels")
    assert found.figures["images_per_s"] > 1


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan"), 7.0])
def test_a_stream_of_one_colour_or_of_wrong_values_is_found(value):
    found = stream.judge(torch.full((2, 3, 8, 8), value), 300.0, CPU)
    assert_says(found, "failed", "of the values are in [0, 1]", "augmentation")


@pytest.mark.slow
def test_training_steps_are_timed_beside_their_parts():
    found = step.check(Asked())
    assert_says(found, "ok", "expected of its parts", "cit_tiny_patch16_224")
    assert found.figures["images_per_s"] == pytest.approx(found.figures["expected_images_per_s"], rel=0.6)


def test_steps_that_are_slow_starved_too_large_or_not_finite_are_named():
    good = step.Measured(loop=900, expected=1000, data=2000, networks=1000, peak=10 * GIB, planned=10 * GIB)
    gpu = torch.device("cuda")
    assert_says(step.judge(good, step.PAPERS, gpu), "ok", "900 images/s", "1e+03 expected", "10.0 planned", "rednet101")
    cases = {
        "something else takes": {"loop": 500},
        "the data stream gives 700 images/s, the networks take 1000": {"data": 700},
        "estimate of memory is too low": {"peak": 13 * GIB},
    }
    for words, change in cases.items():
        assert_says(step.judge(dataclasses.replace(good, **change), step.PAPERS, gpu), "warning", words)
    bad = dataclasses.replace(good, skipped=2)
    assert_says(step.judge(bad, step.PAPERS, gpu), "failed", "2 of 8 gradients were not finite")


# ---------------------------------------------------------------------------------------------------------------------
# The processes


PLANTED = {
    "fine": "print('chatter'); return ok('all is well', {'version': '1'}, {'speed': 2.0})",
    "crash": "import ctypes; ctypes.string_at(0)",
    "leave": "print('cannot go on'); import sys; sys.stdout.flush(); import os; os._exit(9)",
    "hang": "import time; time.sleep(600)",
    "spawn": "import subprocess, time; child = subprocess.Popen(['sleep', '600']); "
    "(asked.runs_dir / 'pid').write_text(str(child.pid)); time.sleep(600)",
    "raise_error": "raise ValueError('a plain\\nerror ' + 'x' * 1000)",
    "no_module": "import no_such_module",
    "mark": "(asked.runs_dir / 'begun').touch(); return ok('')",
    "litter": "import tempfile; return ok(tempfile.NamedTemporaryFile(suffix='.left', delete=False).name)",
    "after": "return ok(asked.found['fine'].facts['version'])",
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """``planted(*names)``: what the doctor says of checks that do what PLANTED has."""
    for name, body in PLANTED.items():
        text = f"from cit_scale.doctor.findings import ok\ndef check(asked):\n    {body}\n"
        (tmp_path / f"planted_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(examine, "WHOLE_S", 5.0)

    def run(*names):
        checks = [examine.Check(name, f"planted_{name}") for name in names]
        return {each.name: each for each in examine.examine(Asked(runs_dir=tmp_path), checks)}

    return run


def test_a_check_that_crashes_exits_or_raises_has_failed_and_the_next_one_is_made(planted, capfd):
    found = planted("fine", "crash", "leave", "raise_error", "no_module", "after")
    assert found["fine"].finding == ok("all is well", {"version": "1"}, {"speed": 2.0})
    assert found["fine"].printed == ""
    assert_says(found["crash"].finding, "failed", "was ended by SIGSEGV")
    assert "Segmentation fault" in found["crash"].printed  # where it was
    assert_says(found["leave"].finding, "failed", "ended with code 9")
    assert found["leave"].printed == "cannot go on"
    assert_says(found["raise_error"].finding, "failed", "ValueError: a plain error xxx")
    assert len(found["raise_error"].finding.says) < 400
    assert "_Ended" not in found["raise_error"].printed  # how a check is ended that has answered
    assert_says(found["no_module"].finding, "failed", "ModuleNotFoundError", "no_such_module")
    assert found["after"].finding.says == "1"  # of an earlier check
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("is_known", [True, False])
def test_a_check_does_not_begin_where_its_start_is_interrupted(planted, tmp_path, monkeypatch, is_known):
    """Ctrl-C between the fork and its number leaves nobody to end it."""
    start = BaseProcess.start

    def start_interrupted(process):
        start(process)
        if not is_known:
            multiprocessing.process._children.discard(process)
            process._popen = None
        raise KeyboardInterrupt

    monkeypatch.setattr(BaseProcess, "start", start_interrupted)
    with pytest.raises(KeyboardInterrupt):
        planted("mark")
    time.sleep(2)
    assert not (tmp_path / "begun").exists()
    monkeypatch.setattr(BaseProcess, "start", start)
    planted("mark")
    assert (tmp_path / "begun").exists()


def test_what_libraries_leave_in_the_folder_of_temporary_files_is_removed(planted):
    left = planted("litter")["litter"].finding.says
    assert left.endswith(".left")
    assert not Path(left).parent.exists()


@pytest.mark.slow
def test_a_check_that_hangs_is_given_up_with_all_that_it_started(planted, tmp_path):
    found = planted("spawn", "hang", "fine")
    for name in ("spawn", "hang"):
        assert_says(found[name].finding, "failed", "no answer within 5 s")
        assert f"planted_{name}.py" in found[name].printed  # where it stands
    assert found["fine"].finding.status == "ok"
    child = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_where_the_gpus_have_failed_no_check_that_needs_one_is_made(planted, tmp_path):
    (tmp_path / "planted_gpus.py").write_text(
        "from cit_scale.doctor.findings import failed\ndef check(asked): return failed('broken', 'mend it')\n"
    )
    checks = [
        examine.Check("GPUs", "planted_gpus"),
        examine.Check("step", "planted_fine"),
        examine.Check("disk", "planted_fine", uses_device=False),
    ]
    found = {each.name: each.finding for each in examine.examine(Asked(), checks)}
    assert_says(found["step"], "n/a", "the GPUs have failed")
    assert found["disk"].status == "ok"


@pytest.mark.fault
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_doctor_that_is_stopped_leaves_no_process_and_no_file(tmp_path, signum, code):
    """While the disk is written, which takes a minute here."""
    (tmp_path / "planted_disk.py").write_text(
        "import time\nfrom cit_scale.doctor.disk import scratch_folder\ndef check(asked):\n"
        "    with scratch_folder(asked.runs_dir):\n        time.sleep(60)\n"
    )
    (tmp_path / "slow.py").write_text(
        "import signal\nfrom cit_scale.__main__ import main\nfrom cit_scale.doctor import examine, show\n"
        "if __name__ == '__main__':\n"
        "    show.examine = lambda asked: examine.examine(asked, [examine.Check('disk', 'planted_disk')])\n"
        # As from a terminal: tests in the background or under nohup ignore these, and so would what they start.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "    raise SystemExit(main(['doctor', '--runs_dir', 'runs']))\n"
    )
    for name in ("runs", "tmp"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    doctor = subprocess.Popen([sys.executable, "slow.py"], cwd=tmp_path, env=environment, start_new_session=True)
    while not list((tmp_path / "runs").iterdir()):
        assert doctor.poll() is None
        time.sleep(0.01)
    family = psutil.Process(doctor.pid).children(recursive=True)
    doctor.send_signal(signum)
    assert doctor.wait(30) == code
    assert not list((tmp_path / "runs").iterdir())
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_a_hang_up_does_not_end_a_doctor_under_nohup(monkeypatch):
    monkeypatch.setattr(show, "_run", lambda arguments: 0)
    before = [signal.getsignal(each) for each in (signal.SIGHUP, signal.SIGTERM)]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        show.run(None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == show._leave
    finally:
        for signum, handler in zip((signal.SIGHUP, signal.SIGTERM), before, strict=True):
            signal.signal(signum, handler)


class OnGpu(World):
    """A stand-in for a rank on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize(("free_gib", "images"), [(80.0, 128), (8.0, 32), (1.0, 8)])
def test_a_small_gpu_is_given_as_many_images_as_fit(free_gib, images, monkeypatch):
    monkeypatch.setattr(step, "has_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), 80 * GIB))
    prepared, task = step.prepare_to_fit(step.PAPERS, OnGpu())
    assert task.batch_size == prepared.batch_split.micro_batch_size == images


@pytest.mark.skipif(torch.version.cuda is None, reason="asks a PyTorch that is built for CUDA")
@pytest.mark.parametrize(("more", "is_spoiled"), [("", False), ("torch.cuda.is_available()", True)])
def test_what_is_imported_for_all_checks_leaves_cuda_alone(more, is_spoiled):
    """PyTorch refuses CUDA in the forks of a process that has asked for it."""
    program = f"""
        import os, torch
        import cit_scale.doctor.preload, cit_scale.bench.step_ways, cit_scale.doctor.engines
        {more}
        if os.fork() == 0:
            os._exit(int(torch.cuda._is_in_bad_fork()))
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert told.stdout == f"{int(is_spoiled)}\n"


def test_a_full_disk_that_does_not_take_the_table_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cit_scale", "doctor", "--quick"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 6
    assert re.fullmatch(r"error: .*No space left on device\n", done.stderr)


def test_quick_makes_only_what_answers_in_seconds(planted, tmp_path):
    checks = [examine.Check("slow one", "planted_hang"), examine.Check("fine", "planted_fine", is_quick=True)]
    assert [each.name for each in examine.examine(Asked(quick=True), checks)] == ["fine"]
    quick = [check.name for check in examine.CHECKS if check.is_quick]
    assert quick == ["machine", "packages", "compilers", "GPUs", "precision", "JPEG decoder", "disk"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def doctor(*arguments, env=None):
    command = [sys.executable, "-m", "cit_scale", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=240)


@pytest.mark.slow
def test_the_quick_doctor_finds_this_machine_fit(tmp_path):
    done = doctor("--quick", "--runs_dir", tmp_path, env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    for check in examine.CHECKS:
        assert (f"│ {check.name} " in done.stdout) is check.is_quick
    assert done.stdout.rstrip().endswith("nothing wrong in what --quick looks at")


@pytest.mark.slow
def test_the_doctor_says_what_is_wrong_and_what_to_do_and_ends_with_8(tmp_path):
    (tmp_path / "file").touch()
    environment = {"CXX": "false", "COLUMNS": "100"}
    done = doctor("--quick", "--runs_dir", tmp_path / "file", env=environment)
    assert done.returncode == 8
    assert "failed: disk: " in done.stdout
    assert "what to do: name a writable folder" in done.stdout
    assert "warning: compilers: " in done.stdout
    assert "not fit to train" in done.stdout
    done = doctor("--quick", "--json", "--runs_dir", tmp_path / "file", env=environment)
    record = json.loads(done.stdout)  # nothing else is printed there
    assert done.returncode == 8
    assert not record["fit"]
    assert record["quick"]
    statuses = {check["name"]: check["status"] for check in record["checks"]}
    assert statuses["disk"] == "failed"
    assert statuses["compilers"] == "warning"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13"),
        ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV"),
        ("import time; time.sleep(600)", "no answer within"),
    ],
)
def test_a_torch_that_cannot_be_loaded_is_a_row_of_the_table(tmp_path, fault, said):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(f"{fault}\n")
    # In the place of the minutes that a hang may take.
    (tmp_path / "quick.py").write_text(
        "from cit_scale.doctor import examine\nfrom cit_scale.__main__ import main\n"
        "if __name__ == '__main__':\n    examine.QUICK_S = 2.0\n    raise SystemExit(main(['doctor', '--quick']))\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "quick.py")], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 8, done.stdout + done.stderr
    assert said in done.stdout
    assert "│ disk " in done.stdout
    assert "Traceback" not in done.stderr


def test_markup_and_long_lines_are_printed_as_they_are(capsys):
    finding = failed("[red]no[/red] markup " + "w" * 300, "[link]do this[/link]")
    show.show([examine.Examined("check", finding, 1.0, "[b]printed[/b]\nlast")])
    printed = capsys.readouterr().out
    assert "[red]no[/red] markup" in printed
    assert "what to do: [link]do this[/link]" in printed
    assert "    [b]printed[/b]\n    last\n" in printed
    assert "w" * 300 in printed  # in one line below the table


# ---------------------------------------------------------------------------------------------------------------------
# Nodes beside each other


def record(*, status="ok", version="1", speed=100.0):
    finding = Finding(status, "it says", "do that" if status != "ok" else "", {"version": version}, {"speed": speed})
    return show.as_record([examine.Examined("disk", finding, 1.0, "")], quick=False)


def test_nodes_that_are_unfit_missing_slow_or_of_another_version_are_named():
    alike = {f"node{i}": record(speed=100 + i) for i in range(4)}
    assert compare.lines_about(alike, []) == []
    odd = {**alike, "node8": record(status="failed"), "node9": record(version="2", speed=20.0)}
    assert compare.lines_about(odd, ["node7"]) == [
        "node7: no answer; see its log, and run cit-scale doctor there",
        "node8: failed: disk: it says; what to do: do that",
        "differs: disk, version: node9 2; the others 1",
        "below the others: disk, speed: node9 20; the median is 100",
    ]


def test_where_no_version_has_the_most_nodes_all_are_named():
    lines = compare.lines_about({"a": record(version="1"), "b": record(version="2")}, [])
    assert lines == ["differs: disk, version: a 1; b 2"]


def test_a_fact_that_one_node_lacks_is_compared_among_the_others():
    one = record()
    one["checks"][0]["facts"] = {}
    assert compare.lines_about({"a": one, "b": record(), "c": record()}, []) == []
