"""What a run is said to need, against numbers worked by hand and what a real forward pass keeps."""

import dataclasses

import pytest
import torch
from engine_cases import tiny_network
from safetensors.torch import save_file
from tiny_run import TINY_CIT
from torch import nn

from cit_scale import cli
from cit_scale.config import EngineConfig
from cit_scale.data.reader import Reader
from cit_scale.data.versions import LATEST
from cit_scale.distributed.world import World
from cit_scale.engines.activation_checkpointing import checkpoint_activations
from cit_scale.engines.build import build_engine, prepare_engine
from cit_scale.models.network import Network, build_network
from cit_scale.run.plan import (
    Sharding,
    activation_bytes,
    classes_text,
    estimate_memory,
    kept_for_backward,
    passing_bytes,
    plan_lines,
    plan_run,
    read_sharding,
    state_memory,
)
from cit_scale.run.setup import check_all_settings, with_images


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
        (["--engine.ds_config", "zero3"], (1000, 1000, 2000, 0)),
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


def test_what_two_layers_keep_is_counted_by_hand():
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    images = torch.rand(2, 5)
    # Both layers keep their input, the rectifier its output, which is the second layer's input; no weights.
    assert kept_for_backward(network, images, network.parameters()) == 4 * (2 * 5 + 2 * 4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_keep_what_real_ones_keep(precision, checkpointing):
    network = tiny_student()
    if checkpointing:
        checkpoint_activations(network)
    engine = EngineConfig(precision=precision)
    network.train()
    network.precision = precision
    real = kept_for_backward(network, torch.rand(4, 3, 32, 32), [*network.parameters(), *network.buffers()])
    fake = activation_bytes(network, engine, (4, 3, 32, 32))
    if precision == "float32":
        assert fake == real
    else:  # of BatchNorm's two numbers a channel fake tensors say that they are in bf16, and they are in float32
        assert 0 <= real - fake < real / 1000


def test_checkpointing_counts_the_inputs_of_all_blocks_and_one_block_more():
    by_depth = {}
    for depth in (2, 4):
        for checkpointing in (False, True):
            engine = EngineConfig(activation_checkpointing=checkpointing)
            by_depth[depth, checkpointing] = activation_bytes(tiny_student(depth), engine, (4, 3, 32, 32))
    block = (by_depth[4, False] - by_depth[2, False]) // 2
    block_input = (by_depth[4, True] - by_depth[2, True]) // 2
    assert block_input == 4 * (4 * (16 + 2) * 32)  # float32, images x tokens x channels
    assert by_depth[4, False] - by_depth[4, True] == pytest.approx(3 * (block - block_input), abs=block_input)


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
    assert "without workspace and fragmentation" in memory
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
    by_hand = {size: 4 * 2 * size * size * (4 + 4) for size in (8, 16)}  # into and out of the rectifier, two images
    assert passing_bytes(Network(network), (2, 3, 8, 8)) == by_hand[8]
    assert passing_bytes(Network(network, image_size=16), (2, 3, 8, 8)) == by_hand[16]
