"""What a run is said to need, against numbers worked by hand and what a real forward pass keeps."""

import dataclasses
import gc
import itertools

import pytest
import torch
from engine_cases import tiny_network
from ranks import run_on_ranks
from safetensors.torch import save_file
from tiny_run import TINY_CIT
from torch import nn

from cit_scale import cli
from cit_scale.batch import teacher_logits_type
from cit_scale.config import EngineConfig
from cit_scale.data.reader import Reader
from cit_scale.data.versions import LATEST
from cit_scale.distributed.world import World
from cit_scale.engines.build import build_engine, prepare_engine
from cit_scale.losses import co_advise_loss
from cit_scale.models.network import Network, build_network, tensors_of
from cit_scale.run.live_bytes import LiveBytes
from cit_scale.run.plan import (
    CERTAINTY,
    GIB,
    Buffers,
    Sharding,
    _zero_buffers,
    classes_text,
    engine_buffers,
    estimate_memory,
    network_memory,
    passing_bytes,
    plan_lines,
    plan_run,
    read_sharding,
    state_memory,
    student_bytes,
)
from cit_scale.run.setup import check_all_settings, with_images
from cit_scale.teachers import freeze


def parse(*argv):
    return cli.parse_arguments(argv).config


def sharding_of(world_size, *argv):
    return read_sharding(prepare_engine(parse(*argv), World(world_size=world_size)))


def tiny_student(depth=2):
    kwargs = {**TINY_CIT, "depth": depth}
    return build_network("cit_tiny_patch16_224", kwargs, num_classes=3, image_size=32, teachers=("conv",))


# 1000 parameters are 4000 bytes; a quarter of them, on four ranks, 1000. By row: weights, gradients, moments, host.
@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (["--engine.name", "plain"], (4000, 4000, 8000, 0)),
        (["--engine.ds_config", "zero0"], (4000, 4000, 8000, 0)),
        (["--engine.ds_config", "zero1"], (5000, 4000, 2000, 0)),  # with the updated share's copy
        (["--engine.ds_config", "zero2"], (5000, 1000, 2000, 0)),
        (["--engine.ds_config", "zero2_offload"], (4000, 0, 0, 4000)),
        (["--engine.ds_config", "zero3"], (2000, 1000, 2000, 0)),  # likewise
        (["--engine.ds_config", "zero3_offload"], (0, 0, 0, 5000)),
        (["--engine.name", "fsdp2"], (1000, 1000, 2000, 0)),
    ],
)
def test_the_state_is_shared_out_as_the_engine_does_it(engine, expected):
    world_size = 1 if "plain" in engine else 4
    memory = state_memory(1000, sharding_of(world_size, *engine), world_size, has_average=False)
    assert (memory.weights, memory.gradients, memory.moments, memory.host) == expected
    assert memory.average == 0
    assert memory.checkpoint == 12000


def test_the_moving_average_lies_where_the_moments_lie():
    shared = state_memory(1001, Sharding(optimizer=True), 4, has_average=True)
    assert (shared.moments, shared.average, shared.checkpoint) == (2 * 4 * 251, 4 * 251, 16 * 1001)  # rounded up
    offloaded = state_memory(1000, Sharding(optimizer=True, offloads_optimizer=True), 4, has_average=True)
    assert (offloaded.average, offloaded.host) == (0, 4000 + 2000 + 1000)


def test_fsdp2_adds_gradients_up_whole_over_several_micro_steps():
    assert sharding_of(4, "--engine.name", "fsdp2").gradients
    assert not sharding_of(4, "--engine.name", "fsdp2", "--train.micro_batch_size", "8").gradients


def test_a_checkpoint_is_as_large_as_the_state_that_an_engine_saves():
    config = parse("--optim.ema_decay", "0.9", "--engine.name", "plain")
    network = tiny_network()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    engine = build_engine(network, prepare_engine(config, World()))
    saved = sum(
        shape.numel()
        for key, shape in engine.state_shapes().items()
        if "/" in key and "norm.running" not in key and "norm.num" not in key  # neither counters nor buffers
    )
    assert state_memory(parameters, Sharding(), 1, has_average=True).checkpoint == 4 * saved


def test_what_is_alive_at_the_peak_is_counted_by_hand():
    images = torch.rand(2, 5)
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with LiveBytes([images, *network.parameters()]) as live, torch.no_grad():
        logits = network(images)
    # The second layer: its input, which is the rectifier's output, and its output.
    assert live.peak == 4 * max(2 * (4 + 4), 2 * (4 + 3))
    assert live.now == logits.nbytes
    del logits
    assert live.now == 0
    with LiveBytes([images, *network.parameters()]) as live:
        logits = network(images)  # noqa: F841  kept alive
    # Kept for the backward pass: the rectifier's output. The first layer's goes.
    assert live.now == 4 * 2 * (4 + 3)


def allocated_peak(build, step):
    """Bytes that torch's allocator has given out at the peak of the second step, whatever gave them back counted.

    An account of its own: of the allocator, where ``LiveBytes`` looks at tensors, and of real steps.
    """
    gc.collect()  # what other tests have left must not be given back in the midst of it
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        built = build()
        gc.collect()  # torch.fx leaves copies behind that know themselves
        step(built)
        with torch.profiler.record_function("the second step"):
            step(built)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "the second step")
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    sums = itertools.accumulate(nbytes for _, nbytes in changes)
    return max(total for (when, _), total in zip(changes, sums, strict=True) if when >= begin)


CIT, ADVISED = "cit_tiny_patch16_224", "resnet18"
SIZE, CLASSES, TEACHERS = 64, 100, ("conv", "inv")


def student_for(name):
    return build_network(name, {}, num_classes=CLASSES, image_size=SIZE, teachers=TEACHERS)


def measured_and_estimated(world, name, micro_steps, *argv):
    """Peaks of this rank's step, in bytes, by torch's allocator and by the plan."""
    micro, total = "--train.micro_batch_size", "--train.global_batch_size"
    config = parse(micro, "8", total, str(8 * micro_steps * world.world_size), *argv)
    setup = prepare_engine(config, world)
    images, targets = torch.rand(8, 3, SIZE, SIZE), torch.full((8, CLASSES), 1 / CLASSES)
    advice = teacher_logits_type(TEACHERS)(torch.rand(8, CLASSES), torch.rand(8, CLASSES))
    weights = dict.fromkeys(TEACHERS, 1.0)

    def step(engine):
        engine.module.train()
        for _ in range(micro_steps):
            logits = engine.forward(images)
            engine.backward(co_advise_loss(logits, advice, targets, temperature=1.0, weights=weights).total)
        engine.step(1e-3)

    measured = allocated_peak(lambda: build_engine(student_for(name), setup), step)
    with torch.device("meta"):
        network = student_for(name)
    return measured, network_memory(network, (), setup, SIZE, CLASSES).device


def show(measured, estimated, *what):
    """A row of docs/measurements/memory.md; pytest -s prints it."""
    mib = f"{measured / 2**20:.1f} | {estimated / 2**20:.1f} | {estimated / measured:.2f}"
    print(f"\n| {' | '.join(map(str, what))} | {mib} |")


@pytest.mark.parametrize(
    ("name", "precision", "micro_steps", "checkpointing"),
    [
        (CIT, "float32", 1, "false"),
        (CIT, "float32", 2, "false"),
        (CIT, "float32", 2, "true"),
        (CIT, "bf16", 1, "false"),
        (CIT, "bf16", 2, "false"),
        (ADVISED, "float32", 1, "false"),
        (ADVISED, "bf16", 2, "false"),
    ],
)
def test_the_estimate_is_what_the_plain_engines_step_takes(name, precision, micro_steps, checkpointing):
    argv = "--engine.name", "plain", "--engine.precision", precision, "--engine.activation_checkpointing", checkpointing
    measured, estimated = measured_and_estimated(World(), name, micro_steps, *argv)
    show(measured, estimated, "plain", name, precision, micro_steps, checkpointing)
    assert measured == pytest.approx(estimated, rel=0.1)


# What gloo's threads give back the profiler does not hear of, and it counts as if it stayed: the least of three.
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("micro_steps", [1, 2])
def test_the_estimate_is_near_what_a_sharded_step_takes(engine, precision, micro_steps):
    sharding = ("--engine.name", "fsdp2") if engine == "fsdp2" else ("--engine.ds_config", engine)
    argv = CIT, micro_steps, *sharding, "--engine.precision", precision
    measured, estimated = min(run_on_ranks(2, measured_and_estimated, *argv)[0] for _ in range(3))
    show(measured, estimated, engine, CIT, precision, micro_steps, "false")
    assert measured == pytest.approx(estimated, rel=0.2)  # as CERTAINTY says


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_estimate_is_what_a_frozen_teacher_takes(precision):
    def teacher():
        return build_network("resnet18", {}, num_classes=CLASSES, image_size=SIZE, own_size=96)

    images = torch.rand(8, 3, SIZE, SIZE)
    measured = allocated_peak(
        lambda: freeze(teacher(), SIZE, torch.device("cpu"), precision=precision, compile=False),
        lambda forward: forward(images),
    )
    with torch.device("meta"):
        network = teacher()
    network.precision = precision
    weights = sum(tensor.nbytes for tensor in tensors_of(network).values())
    estimated = weights + passing_bytes(network, (8, 3, SIZE, SIZE))
    show(measured, estimated, "a teacher", "resnet18 at 96 pixels", precision, "", "")
    assert measured == pytest.approx(estimated, rel=0.1)


def test_checkpointing_counts_the_inputs_of_all_blocks_and_one_block_more():
    by_depth = {}
    for depth in (4, 6):
        for checkpointing in (False, True):
            kwargs = {**TINY_CIT, "depth": depth}
            network = build_network(
                CIT, kwargs, num_classes=3, image_size=32
            )  # no teachers: no stem, whose peak is its own
            engine = EngineConfig(activation_checkpointing=checkpointing)
            by_depth[depth, checkpointing] = student_bytes(network, engine, (4, 3, 32, 32), 3, has_gradients=True)
    block = (by_depth[6, False] - by_depth[4, False]) // 2
    block_input = (by_depth[6, True] - by_depth[4, True]) // 2
    assert block_input == 4 * (4 * (16 + 1) * 32)  # float32, images x tokens x channels
    assert by_depth[4, False] - by_depth[4, True] == pytest.approx(3 * (block - block_input), abs=block)


# Elements by hand, of a network of 1000 parameters: DeepSpeed's buckets, gradients in a row, what is gathered.
@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 0}, Buffers(0, 4000)),
        ({"stage": 1, "reduce_bucket_size": 5000}, Buffers(4 * 5000, 4 * (5000 + 1000))),
        ({"stage": 2, "reduce_bucket_size": 600}, Buffers(4 * (600 + 600), 4 * (600 + 600))),
        ({"stage": 2, "reduce_bucket_size": 600, "overlap_comm": True}, Buffers(4 * (1200 + 600), 4 * (1200 + 600))),
        ({"stage": 1, "contiguous_gradients": False, "reduce_bucket_size": 5000}, Buffers(0, 4000)),
        ({"stage": 1}, Buffers(4 * 500_000_000, 4 * (500_000_000 + 1000))),
        (
            {"stage": 3, "reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": 200},
            Buffers(4 * (5000 + 1000 + 200), 4 * (5000 + 1000)),
        ),
        (
            {"stage": 3, "reduce_bucket_size": 5000, "prefetch_bucket_size": 0, "max_live_parameters": 300},
            Buffers(4 * (5000 + 300), 4 * (5000 + 1000)),
        ),
    ],
)
def test_what_zero_gathers_and_reduces_is_counted_by_its_settings(zero, expected):
    assert _zero_buffers(zero, 1000) == expected


def test_fsdp2_gathers_its_root_and_three_blocks():
    network, counted = tiny_student(4), {}
    for precision in ("float32", "bf16"):
        setup = prepare_engine(parse("--engine.name", "fsdp2", "--engine.precision", precision), World(world_size=4))
        counted[precision] = engine_buffers(setup, network).backward
    whole = sum(parameter.numel() for parameter in network.parameters())
    block = sum(parameter.numel() for parameter in network.model.blocks[0].parameters())
    assert counted["float32"] == 4 * (whole - 4 * block) + 4 * 3 * block
    assert counted["bf16"] == 4 * (whole - 4 * block) + 2 * 3 * block - 2 * 4 * block  # for autocast's copies


def plan_of(digits, *more):
    argv = ["--train.micro_batch_size", "8", "--teachers.conv.weights", "conv.pth", *more]
    arguments = cli.parse_arguments(argv)
    config, teacher_run_configs = arguments.config, arguments.teacher_run_configs
    setups = check_all_settings(config, teacher_run_configs, World(world_size=4), same_run=False)
    return plan_run(with_images(config, teacher_run_configs, setups, {LATEST.pixels: (Reader(digits), Reader(digits))}))


@pytest.fixture
def plan(tiny_digits):
    return plan_of(tiny_digits)


def test_a_plan_says_how_long_the_run_is_and_what_comes_first(plan):
    assert (plan.micro_batch_size, plan.micro_steps) == (8, 2)
    assert (plan.train_images, plan.steps_per_epoch, plan.total_steps) == (1797, 28, 15 * 28)
    assert plan.checkpoints_kept == 2 + 1
    assert list(plan.teachers) == ["inv"]
    assert plan.teachers["inv"].total_steps == plan.teachers["inv"].config.train.epochs * 28
    assert plan.teachers["inv"].memory.teachers == 0 < plan.memory.teachers


def test_a_plan_in_words_says_what_the_estimate_leaves_out(plan):
    lines = plan_lines(plan, "GPU")
    assert "update           64 images = 4 ranks x 2 micro-steps x 8 images" in lines
    assert "epoch            1797 images, 28 steps; a rank sees 16 images a step, 448 an epoch" in lines
    (memory,) = (line for line in lines if line.startswith("memory per GPU"))
    assert CERTAINTY in memory
    assert "without fragmentation" in memory
    assert memory.endswith("workspace 1.00 GiB (assumed)")
    assert not any("workspace" in line for line in plan_lines(plan, "rank"))
    assert plan.memory.device > plan.memory.workspace == GIB
    assert len(memory) <= 490
    assert "teacher conv     regnety_002 with weights conv.pth" in lines
    assert any(line.startswith("teacher inv      rednet26 is trained first") for line in lines)


def test_a_plan_says_how_many_repeats_meet(plan, tiny_digits):
    assert not any(line.startswith("repeats") for line in plan_lines(plan, "GPU"))
    (line,) = (
        line for line in plan_lines(plan_of(tiny_digits, "--augment.repeats", "3"), "GPU") if line.startswith("repeats")
    )
    said = "3 of each image, by augment.repeats; 84 % of them share an update with another of their image"
    assert line == f"repeats          {said}"


def test_checkpoints_kept_for_good_are_counted(plan):
    train = dataclasses.replace(plan.config.train, keep_every_steps=100, keep_best=1)
    longer = dataclasses.replace(plan, config=dataclasses.replace(plan.config, train=train))
    assert longer.checkpoints_kept == 2 + 4 + 1


def test_the_classes_are_listed_with_their_images_and_what_balances_them(tiny_digits):
    def text(*argv):
        arguments = cli.parse_arguments([*argv, "--teachers", "null"])
        setups = check_all_settings(arguments.config, {}, World(), same_run=False)
        return classes_text(
            with_images(arguments.config, {}, setups, {LATEST.pixels: (Reader(tiny_digits), Reader(tiny_digits))})
        )

    assert text().startswith("10 classes: 8 174, 2 177, ")
    balanced = text("--data.balance", "full", "--distill.class_weights", "sqrt")
    assert balanced.startswith("10 classes: 8 174 -> 179, 2 177 -> 179, ")
    assert balanced.endswith(
        "; images -> places in an epoch, by data.balance=full; weighed in the label loss by "
        "distill.class_weights=sqrt, so that a rare class counts by both"
    )


def test_what_is_frozen_has_no_gradient_and_no_moments(tiny_digits, tmp_path):
    def prepare(*argv):
        arguments = cli.parse_arguments(["--teachers", "null", *argv])
        setups = check_all_settings(arguments.config, {}, World(), same_run=False)
        return with_images(arguments.config, {}, setups, {LATEST.pixels: (Reader(tiny_digits), Reader(tiny_digits))})

    whole = prepare()
    save_file(whole.build_student().model.state_dict(), tmp_path / "first.safetensors")
    frozen = prepare("--student.weights", str(tmp_path / "first.safetensors"), "--train.freeze", "[trunk]")
    all_of_it, head_alone = estimate_memory(whole), estimate_memory(frozen)
    head = 4 * (96 * 10 + 10)  # float32, features of the recipe's student, classes
    assert (head_alone.gradients, head_alone.moments) == (head, 2 * head)
    assert head_alone.checkpoint == all_of_it.weights // 2 + 2 * head
    assert head_alone.activations < all_of_it.activations


def test_what_passes_through_a_teacher_counts_at_its_own_size():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    network.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    # Two images, normalised, with what goes into the rectifier and what comes out.
    by_hand = {size: 4 * 2 * size * size * (3 + 4 + 4) for size in (8, 16)}
    assert passing_bytes(Network(network), (2, 3, 8, 8)) == by_hand[8]
    resized = 4 * 2 * 16 * 16 * 3
    assert passing_bytes(Network(network, image_size=16), (2, 3, 8, 8)) == by_hand[16] + resized


def test_batches_are_those_of_the_queue_in_use_mixed_and_decoded(tiny_digits):
    def batches(*argv):
        return plan_of(tiny_digits, *argv).memory.batches

    images, logits, decoded = 8 * 3 * 4 * 32 * 32, 8 * 4 * 10 * (1 + 2), 8 * 3 * 8 * 8  # digits have 8 x 8 pixels
    size = ("--data.image_size", "32")
    assert batches(*size, "--data.prefetch", "2") == (2 + 2) * images + logits + decoded
    assert batches(*size, "--data.prefetch", "0") == (1 + 2) * images + logits + decoded
