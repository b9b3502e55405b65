"""cit_scale/bench/step.py: the port computes what ours computes, and the figures are what they are called."""

import contextlib
import dataclasses
import io
import json
import time
import types

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from tiny_run import TINY_CIT
from torch import nn

from cit_scale.bench import plain_port, step, step_ways, watch
from cit_scale.bench.plain_port import PlainPort, draw_mix, plain, plain_teacher
from cit_scale.bench.step import Bench, Figures, derived, parse, report, ways_of
from cit_scale.bench.step_ways import (
    PORT,
    OurStep,
    PortStep,
    Task,
    Way,
    build_teachers,
    draw_batch,
    freeze_teachers,
    prepare,
)
from cit_scale.bench.watch import PARTS, PartClock, Watch, allocated_bytes, covered, enqueue_ms
from cit_scale.config import MixingConfig, StudentConfig, TeacherConfig
from cit_scale.data.mixing import draw_group, mix
from cit_scale.distributed.world import World
from cit_scale.losses import co_advise_loss
from cit_scale.run.flops import forward_flops
from cit_scale.teachers import run_teachers

TASK = Task(
    student=StudentConfig("cit_tiny_patch16_224", TINY_CIT),
    teachers={
        "conv": TeacherConfig("resnet10t", {"channels": [8, 8, 16, 16], "stem_width": 8}),
        "inv": TeacherConfig("rednet26", {"layers": [1, 1, 1, 1], "base_width": 16, "stem_width": 16}),
    },
    image_size=32,
    batch_size=8,
    num_classes=5,
    mixing=MixingConfig(group_size=None),
    matmul_size=64,
)
OURS = Way("plain", "float32", False, "live")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """As the command has it. Several on few cores wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ours():
    prepared = prepare(TASK, OURS, World())
    return OurStep(prepared, freeze_teachers(prepared), draw_batch(TASK, World()))


@pytest.fixture
def ports():
    return PortStep(prepare(TASK, OURS.port, World()), True, draw_batch(TASK, World()))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("is_cutmix", [False, True])
def test_the_port_mixes_a_batch_as_ours_does(is_cutmix):
    batch = draw_batch(TASK, World())
    draws = ((number, draw_group(TASK.mixing, 0, number, 0, 32, 32)) for number in range(100))
    number, how = next((number, how) for number, how in draws if (how.box is not None) == is_cutmix and how.lam < 0.9)
    mixed = mix(batch, TASK.mixing, 5, seed=0, step=number)
    images, targets = plain_port.mix(batch.images, batch.labels, 5, how.lam, how.box)
    torch.testing.assert_close(images, mixed.images)
    torch.testing.assert_close(targets, mixed.targets)


def test_the_port_computes_our_logits_loss_and_gradients(ours):
    """In float64: in float32 a rectifier's input near zero may have either sign, and a gradient differs by 0.002."""
    prepared = prepare(TASK, OURS, World())
    images, targets = torch.rand(8, 3, 32, 32).double(), torch.rand(8, 5).softmax(dim=1)
    engine, frozen = ours.engine, freeze_teachers(prepared)
    engine.module.double()
    for teacher in frozen:
        teacher.network.double()
    teachers = {name: plain_teacher(network.double(), CPU) for name, network in build_teachers(prepared).items()}
    port = PlainPort(prepared.build_student().double(), teachers, 5, CPU)

    advice = run_teachers(frozen, images)
    for name, logits in advice._asdict().items():
        assert logits.std() > 0.01
        assert relative_error(port.teachers[name](images), logits) < 1e-6
    logits = engine.forward(images)
    loss = co_advise_loss(logits, advice, targets, temperature=1.0, weights={"conv": 1.0, "inv": 1.0}).total
    engine.backward(loss)
    for theirs, our in zip(port.forward(images), logits, strict=True):
        assert relative_error(theirs, our) < 1e-6
    port_loss = port.loss(images, targets)
    port_loss.backward()
    assert port_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in engine.module.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in port.student.named_parameters()}
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(theirs[name], gradient) < 1e-5, name


def test_two_updates_of_the_port_are_two_of_ours(monkeypatch):
    task = dataclasses.replace(TASK, mixing=MixingConfig(group_size=None, prob=0.0))
    monkeypatch.setattr(plain_port, "draw_mix", lambda random, size: (1.0, None))
    batch, prepared = draw_batch(task, World()), prepare(task, OURS, World())
    ours, ports = OurStep(prepared, freeze_teachers(prepared), batch), PortStep(prepared, True, batch)
    before = {name: parameter.detach().clone() for name, parameter in ours.engine.module.named_parameters()}
    for _ in range(2):
        ours()
        ports()
    assert ours.skipped == 0
    theirs = dict(ports.port.student.named_parameters())
    with torch.no_grad():
        moved = torch.cat([(p - before[name]).flatten() for name, p in ours.engine.module.named_parameters()])
        apart = torch.cat([(p - theirs[name]).flatten() for name, p in ours.engine.module.named_parameters()])
    assert moved.norm() > 0
    assert apart.norm() < 1e-2 * moved.norm()


def test_the_port_has_no_involution_of_ours_and_its_images_stay_nchw(ports):
    names = {type(module).__name__ for module in ports.port.student.modules()}
    assert "InvolutionOverUnfold" in names
    assert "Involution2d" not in names
    seen = []
    for module in ports.port.student.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].is_contiguous()))
    ports()
    assert len(seen) > 5
    assert all(seen)


def test_the_ports_cutmix_takes_the_share_that_lambda_leaves():
    random = np.random.default_rng(0)
    drawn = [draw_mix(random, 32) for _ in range(200)]
    boxes = [(lam, box) for lam, box in drawn if box is not None]
    assert 60 < len(boxes) < 140
    for lam, (rows, columns) in boxes:
        assert len(range(32)[rows]) * len(range(32)[columns]) == pytest.approx((1 - lam) * 32 * 32)


def test_a_loss_that_is_not_finite_ends_the_port():
    prepared = prepare(TASK, OURS, World())
    port = PlainPort(prepared.build_student(), {}, 5, CPU)
    with pytest.raises(RuntimeError, match="the loss of the plain port is nan"):
        port.step(torch.full((8, 3, 32, 32), torch.nan), torch.zeros(8, dtype=torch.int64))


# Counting and timing


def test_operators_and_memory_of_a_step_are_counted_by_hand():
    watch = Watch()
    old = torch.ones(1000)
    with watch:
        watch.mark("student")
        first = old + 1  # 4,000 bytes
        second = first.view(10, 100) * 2  # 4,000 more; the view is neither memory nor an operator
        del first
        watch.mark("loss")
        old.add_(1)  # in place, in memory that was there
        third = torch.cat([second, second])  # 8,000, when the first 4,000 are gone
    assert watch.operators == {"student": 2, "loss": 2}
    assert watch.peak == 4000 + 8000
    assert third.shape == (20, 100)


def test_what_the_backward_pass_keeps_and_makes_is_counted():
    weight = nn.Parameter(torch.ones(1000))
    with Watch() as watch:
        (weight.exp().exp()).backward(torch.ones(1000))
    # Two results that are kept, the gradient that is given, and the gradients behind the first and the second product.
    assert watch.peak == 5 * 4000
    assert weight.grad is not None


def test_each_storage_is_counted_once():
    before = allocated_bytes(CPU)
    tensor = torch.ones(1000)
    view, parameter = tensor[10:], nn.Parameter(torch.ones(10))
    assert allocated_bytes(CPU) - before == 4000 + 40
    del tensor
    assert allocated_bytes(CPU) - before == 4000 + 40
    del view, parameter
    assert allocated_bytes(CPU) == before


def test_the_time_of_a_part_lasts_until_the_next_one_begins():
    clock = PartClock(CPU)
    for part in ("mix", "student", "mix"):
        clock.mark(part)
        time.sleep(0.02 if part == "mix" else 0.05)
    clock.mark(None)
    assert clock.times["mix"] == pytest.approx(40, abs=15)
    assert clock.times["student"] == pytest.approx(50, abs=15)


def test_the_hosts_time_ends_before_the_device_is_waited_for(monkeypatch):
    called = []

    def wait(device):
        called.append("wait")
        time.sleep(0.2)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert enqueue_ms(lambda: called.append("step"), CPU) < 100
    assert called == ["wait", "step", "wait"]


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(5, 9)], 4),
        ([(10, 20), (0, 5)], 15),  # one after the other, in any order
        ([(0, 10), (2, 4), (9, 12)], 12),  # streams that overlap, one within another
        ([(0, 10), (10, 20)], 20),
        ([(0, 10), (0, 10), (3, 3)], 10),
    ],
)
def test_time_in_which_several_streams_compute_counts_once(intervals, length):
    assert covered(intervals) == length


class Event:
    """As Kineto's, in ns."""

    def __init__(self, kind, start, end):
        self.activity_type, self.start_ns, self.end_ns = (lambda: kind), (lambda: start), (lambda: end)


@pytest.mark.parametrize(
    ("events", "idle"),
    [
        # Two steps of 1 ms each, in which two streams compute for 0.5 ms all in all; what is copied and named is not.
        ([("kernel", 0, 300_000), ("kernel", 200_000, 400_000), ("kernel", 900_000, 1_000_000)], 0.75),
        ([("kernel", 0, 500_000), ("gpu_memcpy", 0, 2_000_000), ("gpu_user_annotation", 0, 2_000_000)], 0.75),
        ([("kernel", 0, 2_500_000)], 0.0),  # slower in the profiler than outside
        ([("gpu_memset", 0, 100)], None),
    ],
)
def test_a_gpu_idles_where_no_kernel_runs(events, idle, monkeypatch):
    class Profile(contextlib.nullcontext):
        def __init__(self, activities):
            super().__init__(self)
            assert activities == [watch.ProfilerActivity.CUDA]
            results = types.SimpleNamespace(events=lambda: [Event(*event) for event in events])
            self.profiler = types.SimpleNamespace(kineto_results=results)

    steps = []
    monkeypatch.setattr(watch, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert watch.idle_share(lambda: steps.append(1), CPU, 1.0, steps=2) == (idle and pytest.approx(idle))
    assert len(steps) == 2


def test_flops_are_a_share_of_the_peak_of_a_device_that_is_known(monkeypatch):
    monkeypatch.setattr(step, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    bench = Bench(TASK, World())
    bench.matmul_ms = {"float32": [1.0], "bf16": [1.0]}
    bf16 = Way("plain", "bf16", True, "live")
    found = {OURS: figures(10.0, flops=67e12 / 1000), bf16: figures(10.0, flops=989e12 / 500)}
    assert derived(OURS, found, bench)["mfu"] == pytest.approx(0.1)
    assert derived(bf16, found, bench)["mfu"] == pytest.approx(0.2)
    assert "| 20 % | n/a | n/a |" in report(found, bench)


def test_our_step_is_the_trainers_and_every_part_of_it_is_marked(ours, ports, monkeypatch):
    updates = []
    real = step_ways.train_step

    def train_step(*arguments):
        updates.append(arguments[4])
        return real(*arguments)

    monkeypatch.setattr(step_ways, "train_step", train_step)
    parts = []
    ours(parts.append)
    assert list(dict.fromkeys(parts)) == list(PARTS)
    ours()
    assert updates == [0, 1]
    parts.clear()
    ports(parts.append)
    assert parts == list(PARTS)


def test_the_result_of_a_step_is_read_after_the_next_one(ours, monkeypatch):
    class Result:
        def __init__(self, number):
            self.number = number

        @property
        def skipped(self):
            read.append((self.number, len(made)))
            return self.number == 0

    read, made = [], []

    def train_step(*arguments):
        made.append(Result(len(made)))
        return type("Trained", (), {"result": made[-1]})

    monkeypatch.setattr(step_ways, "train_step", train_step)
    for _ in range(3):
        ours()
    assert read == [(0, 2), (1, 3)]
    assert ours.skipped == 1


# The command


def test_figures_have_what_a_cpu_can_measure():
    bench = Bench(TASK, World())
    ways = [OURS.port, OURS, Way("plain", "float32", False, "none")]
    found = bench.run(ways, 2)
    assert not bench.refused
    assert list(found) == ways
    for way, figures in found.items():
        assert len(figures.times_ms) == 2
        assert figures.host_share is None
        assert figures.idle_share is None
        assert (figures.plan_mib is None) == (way.engine == PORT)
        assert figures.operators.keys() | {"teachers"} == set(PARTS)
    live, none = found[ways[1]], found[ways[2]]
    student, teachers = prepare(TASK, OURS, World()).build_on_meta()
    assert none.flops == 8 * 3 * forward_flops(student, 32)
    assert live.flops - none.flops == 8 * sum(forward_flops(teacher, 32) for teacher in teachers)
    assert "teachers" not in none.operators
    assert live.operators["student"] == none.operators["student"]
    # The estimate leaves out workspace, and holds the largest moment of each part at once.
    assert 0.6 * live.plan_mib < live.peak_mib < 1.4 * live.plan_mib
    assert none.peak_mib < live.peak_mib
    assert f"| {OURS} |" in report(found, bench)


def figures(*times_ms, flops=0.0):
    return Figures(first_s=1.0, flops=flops, plan_mib=None, times_ms=list(times_ms), parts_ms=dict.fromkeys(PARTS, 1.0))


def test_ratios_are_paired_by_round_and_shares_are_of_the_same_precision():
    bench = Bench(TASK, World(world_size=2))
    bench.matmul_ms = {"float32": [2.0, 1.0, 1.0], "bf16": [0.5, 0.5, 0.5]}
    flops_of_mm = 2 * 64**3
    bf16 = Way("zero1", "bf16", True, "live")
    alone = Way("plain", "float32", False, "none")  # whose port was not measured
    found = {
        OURS.port: figures(20.0, 10.0, 30.0),
        bf16: figures(5.0, 5.0, 5.0, flops=6 * flops_of_mm),
        alone: figures(4.0, 4.0, 4.0, flops=flops_of_mm),
    }
    assert derived(bf16, found, bench) == {
        "images_per_s": [2 * 8 / 5e-3] * 3,
        "port_over_it": 4.0,
        "share_of_mm": pytest.approx(6 * 0.5 / 5),
        "mfu": None,
    }
    assert derived(alone, found, bench)["port_over_it"] is None
    assert derived(alone, found, bench)["share_of_mm"] == pytest.approx(1 / 4)
    bench.refused[OURS] = "no such thing"
    found[bf16].skipped = 2
    shown = report(found, bench)
    assert "| plain, float32, eager, teachers none | 4000 (4000 to 4000) | n/a | 25 % | n/a |" in shown
    assert f"{OURS}: not measured: no such thing" in shown
    assert f"{bf16}: 2 steps were skipped" in shown


def test_a_way_that_cannot_be_measured_costs_its_reason_and_not_the_others(monkeypatch):
    slow = Way("plain", "bf16", False, "live")
    broken = Way("plain", "float32", False, "none")
    monkeypatch.setattr(
        step_ways, "slow_precisions", lambda config, device: ["slow"] * (config.engine.precision == "bf16")
    )

    def out_of_memory(forward, images):
        raise MemoryError("all of\nit is taken")

    monkeypatch.setattr(step, "recorded", out_of_memory)
    bench = Bench(TASK, World())
    assert list(bench.run([slow, broken, OURS], 1)) == [OURS]
    assert bench.refused == {slow: "slow", broken: "MemoryError: all of it is taken"}


def test_deterministic_ways_take_turns_with_the_others():
    ways = ways_of(parse(["--compile", "off", "--deterministic", "both"]))
    assert ways == [OURS.port, OURS, dataclasses.replace(OURS, deterministic=True)]
    bench = Bench(TASK, World())
    assert list(bench.run(ways, 1)) == ways
    assert torch.are_deterministic_algorithms_enabled()
    PortStep(prepare(TASK, OURS.port, World()), True, draw_batch(TASK, World()))()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_combination_is_a_way_beside_the_ports():
    ways = ways_of(parse(["--engines", "plain,zero3", "--precisions", "float32,bf16", "--teachers", "none,live"]))
    assert ways[:2] == [Way(PORT, "float32", False, "none"), Way(PORT, "float32", False, "live")]
    assert len(ways) == len(set(ways)) == 2 + 2 * 2 * 2 * 2
    assert Way("zero3", "bf16", True, "live") in ways


@pytest.mark.parametrize("engine", ["plain", "zero1", "zero3"])
def test_compiled_is_the_student_and_the_teachers_but_at_zero3_the_teachers_alone(engine):
    config = prepare(TASK, Way(engine, "float32", True, "live"), World()).config
    assert config.distill.compile
    assert config.engine.compile == (engine != "zero3")
    assert (config.engine.name, config.engine.ds_config) == (
        ("plain", "zero1") if engine == "plain" else ("zero", engine)
    )


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (("--engines", "plain,zero9"), "'zero9' is none of plain, fsdp2, zero0"),
        (("--repeats", "0"), "--repeats: '0' is not a whole number above 0"),
        (("--image-size", "-4"), "--image-size: '-4' is not a whole number above 0"),
        (("--threads", "two"), "--threads: 'two' is not a whole number above 0"),
        (("--batch-size", "12"), "--batch-size 12: images are mixed 8 at a time; give a multiple of that"),
        (("--json", "/no/such/folder/figures.json"), "--json: '/no/such/folder/figures.json' cannot be written"),
        (("--json", "/"), "--json: '/' cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_answered_before_anything_is(asked, answer, capsys):
    with pytest.raises(SystemExit) as left:
        parse(asked)
    assert left.value.code == 2
    assert answer in capsys.readouterr().err


def sharded_figures(world):
    bench = Bench(TASK, world)
    ways = [OURS.port, *(Way(engine, "float32", False, "live") for engine in ("plain", "fsdp2", "zero1"))]
    found = bench.run(ways, 1)
    return {way.engine: (each.operators, each.peak_mib, each.skipped) for way, each in found.items()}, bench.refused


def test_ranks_measure_the_engines_that_shard_together():
    for found, refused in run_on_ranks(2, sharded_figures):
        assert list(found) == [PORT, "fsdp2", "zero1"]
        assert [way.engine for way in refused] == ["plain"]
        assert found["fsdp2"][1] is None
        assert found["zero1"][1] > 1
        for operators, _, skipped in found.values():
            assert set(operators) == set(PARTS)
            assert skipped == 0


def said_and_written(world, path):
    asked = ["--student", "cit_tiny_patch16_224", "--conv", "resnet10t", "--image-size", "32", "--batch-size", "8"]
    said = io.StringIO()
    step.Task = lambda **given: Task(**given, matmul_size=64)
    with contextlib.redirect_stdout(said):
        code = step.main([*asked, "--classes", "3", "--compile", "off", "--repeats", "1", "--json", path])
    return code, said.getvalue()


def test_the_command_prints_tables_and_writes_all_figures(tmp_path):
    ((code, said),) = run_on_ranks(1, said_and_written, str(tmp_path / "step.json"))
    assert code == 0
    assert "1 threads" in said
    assert torch.backends.cpu.get_cpu_capability() in said
    rows = [line for line in said.splitlines() if line.startswith("| p")]
    assert [row.split(",")[0] for row in rows] == ["| port", "| plain"] * 2
    assert "mfu: n/a" in said
    assert "idle, host: n/a" in said
    written = json.loads((tmp_path / "step.json").read_text())
    assert [way["engine"] for way in written["ways"]] == [PORT, "plain"]
    assert written["ways"][0]["port_over_it"] == 1
    assert written["task"]["image_size"] == 32


def code_where_nothing_is_measured(world):
    return step.main(["--compile", "off", "--repeats", "1", "--image-size", "30"])


def test_the_command_fails_where_nothing_could_be_measured():
    assert run_on_ranks(1, code_where_nothing_is_measured) == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_memory_and_the_host():
    bench = Bench(TASK, World())
    found = bench.run([OURS.port, OURS], 2)
    for each in found.values():
        assert each.peak_mib > 1
        assert 0 < each.host_share < 2
        assert 0 < each.idle_share < 1
        assert set(each.operators) == set(PARTS)


def test_a_teacher_of_the_port_has_no_gradient():
    prepared = prepare(TASK, OURS, World())
    network = build_teachers(prepared)["inv"]
    logits = plain_teacher(network, CPU)(torch.rand(2, 3, 32, 32))
    assert not logits.requires_grad
    assert not network.training
    assert plain(network, CPU) is network
