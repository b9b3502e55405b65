"""Every engine does what plain does, is saved and loaded whole, and undoes a step that is not finite."""

import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_cases import (
    LR,
    SHARDINGS,
    State,
    TinyModel,
    differences,
    local_buffers,
    loss_of,
    make_engine,
    micro_batch,
    numpy_state,
    shardings_on,
    tensors,
    tiny_cit,
    tiny_network,
    update,
)
from ranks import run_on_ranks
from torch import Tensor, nn

from cit_scale.cli import resolve_teacher_runs
from cit_scale.config import EngineConfig, RunConfig, TeacherConfig
from cit_scale.distributed.world import ENDLESS_S, World
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import ENGINES, prepare_engine
from cit_scale.errors import ConfigError, Stopped
from cit_scale.models.network import Network, Precision
from cit_scale.recipe import Given

PRECISIONS = ("float32", "bf16", "fp16")

# A scale at which no gradient of these networks overflows in fp16, and few vanish, however the batch is cut.
CALM_SCALE = 2.0**14


# Every engine does the arithmetic of plain.


@dataclasses.dataclass
class Trajectory:
    """Three updates. losses: by step, then by part of the global batch in its order."""

    losses: list[list[float]]
    grad_norms: list[float]
    initial: State
    state: State
    dtypes: set[torch.dtype]  # of the logits


def trajectory(
    world: World,
    sharding: str,
    micro_steps: int,
    ds_configs: str,
    precision: str = "float32",
    make_network=tiny_network,
) -> Trajectory:
    """On one rank: its own losses."""
    engine = make_engine(world, sharding, micro_steps, ds_configs, make_network, {"precision": precision})
    if precision == "fp16":
        engine.load_state({**tensors(numpy_state(engine)), "loss_scale": torch.tensor([CALM_SCALE, 0.0])})
    initial = numpy_state(engine)
    updates = [update(engine, world, step) for step in range(3)]
    assert not any(result.skipped for _, result in updates)
    engine.module.eval()
    with torch.no_grad():
        logits = engine.forward(micro_batch(0, 0, 1)[0])
    return Trajectory(
        [losses for losses, _ in updates],
        [result.grad_norm for _, result in updates],
        initial,
        numpy_state(engine),
        {head.dtype for head in logits},
    )


Cases = dict[tuple[str, int], Trajectory]


def trajectories(world: World, shardings: list[str], micro_steps: list[int], ds_configs: str, precision: str) -> Cases:
    return {
        (sharding, micro): trajectory(world, sharding, micro, ds_configs, precision)
        for sharding in shardings
        for micro in micro_steps
    }


def common_trajectory(by_rank: list[Trajectory]) -> Trajectory:
    """What the ranks did together, after a look at what they have to agree in."""
    first = by_rank[0]
    for other in by_rank[1:]:
        assert other.grad_norms == first.grad_norms
        assert differences(other.state, first.state) == []
    losses = [[loss for rank in by_rank for loss in rank.losses[step]] for step in range(3)]
    return dataclasses.replace(first, losses=losses)


@pytest.fixture(scope="module", params=PRECISIONS)
def plain(request, ds_configs) -> tuple[str, dict[int, Trajectory]]:
    """The precision, and plain's trajectory by the number of parts that the global batch is cut into."""
    (found,) = run_on_ranks(1, trajectories, ["plain"], [1, 2, 4, 8], ds_configs, request.param)
    return request.param, {parts: trajectory for (_, parts), trajectory in found.items()}


@pytest.fixture(scope="module", params=[1, 2])
def sharded(request, plain, ds_configs) -> tuple[int, Cases]:
    """The number of ranks, and their common trajectory by sharding and micro-steps."""
    precision, _ = plain
    by_rank = run_on_ranks(request.param, trajectories, list(SHARDINGS), [1, 2, 4], ds_configs, precision)
    return request.param, {case: common_trajectory([ranks[case] for ranks in by_rank]) for case in by_rank[0]}


def assert_same_training(ours: Trajectory, expected: Trajectory, precision: str, name: str) -> None:
    """Losses, norms, weights, moments and average, within what another order of sums makes of them.

    In float32 that is the last digits; AdamW divides by the gradient's size, which enlarges them in the weights. At
    bf16 and fp16 such a digit now and then decides a rounding, and with it the sign of an update whose gradient is near
    zero.
    """
    losses_rtol = {"float32": 2e-6, "bf16": 1e-3, "fp16": 1e-3}[precision]
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=losses_rtol, err_msg=name)
    np.testing.assert_allclose(ours.grad_norms, expected.grad_norms, rtol=losses_rtol, err_msg=name)
    assert ours.dtypes == {torch.float32}
    assert ours.state.keys() == expected.state.keys()
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        # BatchNorm's statistics are another matter: local ones are averaged and not accumulated one after the other.
        names = [key.removeprefix("weight/") for key in ours.state if key.startswith("weight/")]
        keys = [f"{kind}/{name}" for name in names]
        assert all(ours.state[key].dtype == np.float32 for key in keys)
        if precision == "float32":
            for key in keys:
                value, plains = ours.state[key], expected.state[key]
                np.testing.assert_allclose(value, plains, rtol=1e-5, atol=1e-5, err_msg=f"{name} {key}")
        assert distance(ours, expected, keys) < {"float32": 1e-3, "bf16": 0.02, "fp16": 0.02}[precision], (name, kind)


def distance(ours: Trajectory, expected: Trajectory, keys: list[str]) -> float:
    """How far two trainings have come apart, as a part of how far they have gone."""
    apart = sum(np.square(ours.state[key] - expected.state[key]).sum() for key in keys)
    gone = sum(np.square(expected.state[key] - expected.initial[key]).sum() for key in keys)
    return math.sqrt(apart / gone)


@pytest.mark.parametrize("micro_steps", [1, 2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_every_engine_trains_as_plain_does(sharding, micro_steps, sharded, plain):
    world_size, found = sharded
    precision, expected = plain
    ours = found[sharding, micro_steps]
    assert_same_training(ours, expected[world_size * micro_steps], precision, sharding)
    if world_size == 1:
        assert_same_buffers(ours.state, expected[micro_steps].state)
        if sharding in ("zero0", "fsdp2"):  # they add nothing to it
            assert differences(ours.state, expected[micro_steps].state) == []


def assert_same_buffers(ours: State, expected: State) -> None:
    for key in [key for key in ours if key.startswith("buffer/")]:
        np.testing.assert_allclose(ours[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_lower_precision_is_near_float32_and_not_the_same(ds_configs):
    (found,) = run_on_ranks(1, by_precision, ["plain", "zero3", "fsdp2"], ds_configs)
    for sharding, (exact, *others) in found.items():
        for rounded in others:
            np.testing.assert_allclose(rounded.losses, exact.losses, rtol=0.01, err_msg=sharding)
            np.testing.assert_allclose(rounded.grad_norms, exact.grad_norms, rtol=0.05, err_msg=sharding)
            assert rounded.losses != exact.losses, f"{sharding} did not compute in it"


def by_precision(world: World, shardings: list[str], ds_configs: str) -> dict[str, list[Trajectory]]:
    return {
        sharding: [trajectory(world, sharding, 2, ds_configs, precision) for precision in PRECISIONS]
        for sharding in shardings
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_student_on_two_ranks_trains_as_plain_does(precision, ds_configs):
    (expected,) = run_on_ranks(1, students, ["plain"], 4, ds_configs, precision)
    by_rank = run_on_ranks(
        2, students, ["zero1", "zero3 all apart", "zero3_offload", "fsdp2"], 2, ds_configs, precision
    )
    for sharding in by_rank[0]:
        ours = common_trajectory([ranks[sharding] for ranks in by_rank])
        assert_same_training(ours, expected["plain"], precision, sharding)


def students(world: World, shardings: list[str], micro_steps: int, ds_configs: str, precision: str) -> dict:
    return {
        sharding: trajectory(world, sharding, micro_steps, ds_configs, precision, tiny_cit) for sharding in shardings
    }


def test_accumulation_leaves_the_mean_gradient_where_it_was(ds_configs):
    """Without BatchNorm between the images, the cut into micro-steps is no difference at all."""
    (norms,) = run_on_ranks(1, grad_norms_in_eval_mode, ds_configs)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


def grad_norms_in_eval_mode(world: World, ds_configs: str) -> list[float]:
    norms = []
    for micro_steps in (1, 2, 4):
        engine = make_engine(world, "plain", micro_steps, ds_configs)
        engine.module.eval()
        norms.append(update(engine, world, 0)[1].grad_norm)
    return norms


@pytest.mark.parametrize("clip_norm", [0.01, 0.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_clipped_to_the_recipes_norm_and_the_norm_before_is_reported(world_size, clip_norm, ds_configs):
    shardings = shardings_on(world_size)
    (found, *_) = run_on_ranks(world_size, clipped_norms, shardings, clip_norm, ds_configs)
    for sharding, (grad_norm, clipped) in found.items():
        assert grad_norm > 0.1, sharding
        assert clipped == pytest.approx(clip_norm or grad_norm, rel=1e-3), sharding


def clipped_norms(
    world: World, shardings: list[str], clip_norm: float, ds_configs: str
) -> dict[str, tuple[float, float]]:
    """By sharding: the norm that the step reports, and the norm of the gradient that AdamW saw."""
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, ds_configs, clip_norm=clip_norm)
        _, result = update(engine, world, 0)
        # After the first update exp_avg is (1 - 0.9) times the gradient.
        moments = [value.ravel() for key, value in numpy_state(engine).items() if key.startswith("exp_avg/")]
        found[sharding] = (result.grad_norm, float(np.linalg.norm(np.concatenate(moments or [np.zeros(1)])) / 0.1))
    return found


# What stands in a checkpoint is everything.


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loaded_engine_continues_with_the_bits_of_one_that_never_stopped(world_size, ds_configs):
    shardings = shardings_on(world_size)
    for different in run_on_ranks(world_size, continuations, shardings, ds_configs):
        assert different == {sharding: ([], []) for sharding in shardings}


def continuations(world: World, shardings: list[str], ds_configs: str) -> dict[str, tuple[list[str], list[str]]]:
    """By sharding: where an engine that was loaded differs from one that went on, if it was fresh and if it had run."""
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, ds_configs)
        for step in range(2):
            update(engine, world, step)
        saved = numpy_state(engine)
        for step in range(2, 4):
            update(engine, world, step)
        undisturbed = numpy_state(engine)

        fresh = make_engine(world, sharding, 2, ds_configs)
        used = make_engine(world, sharding, 2, ds_configs)
        for step in range(7, 9):
            update(used, world, step)
        different = []
        for other in (fresh, used):
            other.load_state(tensors(saved))
            update(other, world, 2, poison="images")  # skipped, back to what was loaded
            for step in range(2, 4):
                update(other, world, step)
            different.append(differences(numpy_state(other), undisturbed))
        found[sharding] = tuple(different)
    return found


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_goes_into_every_other_engine_and_out_again_unchanged(world_size, writers, ds_configs):
    (written, *_) = run_on_ranks(writers, trajectories, shardings_on(writers), [2], ds_configs, "float32")
    states = {sharding: trajectory.state for (sharding, _), trajectory in written.items()}
    (reports, *_) = run_on_ranks(world_size, crossings, states, shardings_on(world_size), ds_configs)
    for crossing, (different, logits, expected) in reports.items():
        assert different == [], crossing
        np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-7, err_msg=str(crossing))
    assert all(state["optimizer_step"] == 3 for state in states.values())


def crossings(world: World, states: dict[str, State], shardings: list[str], ds_configs: str) -> dict:
    """Each state in each engine: what comes out differently, the first logits, and what these should be."""
    images, _ = micro_batch(0, 0, 1)
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, ds_configs)
        engine.module.eval()
        for source, state in states.items():
            engine.load_state(tensors(state))
            with torch.no_grad():
                logits = engine.forward(images).cls
            found[source, sharding] = (
                differences(numpy_state(engine), state), logits.numpy(), logits_by_hand(state, "weight", "buffer")
            )  # fmt: skip
    return found


def logits_by_hand(state: State, *kinds: str) -> np.ndarray:
    """Of the images of step 0, by a network alone with the tensors of these kinds."""
    network = tiny_network().eval()
    arrays = {key.split("/")[1]: array for key, array in state.items() if key.split("/")[0] in kinds}
    network.load_state_dict(tensors(arrays))
    with torch.no_grad():
        return network(micro_batch(0, 0, 1)[0]).cls.numpy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_rank_gets_what_it_asks_for_and_no_more(world_size, ds_configs):
    for found in run_on_ranks(world_size, partial_states, shardings_on(world_size), ds_configs):
        for sharding, (asked, got, different, shapes, all_shapes) in found.items():
            assert asked == got, sharding
            assert different == [], sharding
            assert shapes == all_shapes, sharding


def partial_states(world: World, shardings: list[str], ds_configs: str) -> dict:
    """Each rank asks for another part, the last for nothing."""
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 1, ds_configs)
        update(engine, world, 0)
        everything = numpy_state(engine)
        is_last = world.rank == world.world_size - 1
        asked = set() if is_last and world.world_size > 1 else set(list(everything)[1::3])
        part = {key: tensor.numpy() for key, tensor in engine.state(asked).items()}
        found[sharding] = (
            asked,
            set(part),
            differences(part, {key: everything[key] for key in asked}),
            {key: tuple(shape) for key, shape in engine.state_shapes().items()},
            {key: array.shape for key, array in everything.items()},
        )
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_loading_keeps_no_tensor_but_the_one_before(world_size, ds_configs):
    for alive in run_on_ranks(world_size, most_alive, shardings_on(world_size), ds_configs):
        assert max(alive.values()) <= 2, alive


class FromDisk(Mapping):
    """A state whose tensors are read anew at each look; most_alive: how many were there at once."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most_alive = 0

    def __getitem__(self, key: str) -> Tensor:
        tensor = torch.from_numpy(self.state[key].copy())
        self.alive.add(tensor)
        self.most_alive = max(self.most_alive, len(self.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def most_alive(world: World, shardings: list[str], ds_configs: str) -> dict[str, int]:
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 1, ds_configs)
        state = FromDisk(numpy_state(engine))
        engine.load_state(state)
        found[sharding] = state.most_alive
    return found


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("exp_avg/model.token"), "exp_avg/model.token is missing"),
        (lambda state: state.update({"weight/extra": torch.zeros(1)}), "weight/extra is not known here"),
        (
            lambda state: state.update({"weight/model.cls.bias": torch.zeros(4)}),
            r"weight/model.cls.bias is \(4,\), here \(3,\)",
        ),
        (
            lambda state: [state.pop(key) for key in list(state) if key.startswith("ema/")],
            "ema/model.conv.weight is missing",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(change, complaint, ds_configs):
    engine = make_engine(World(), "plain", 1, ds_configs)
    before = numpy_state(engine)
    update(engine, World(), 0)
    other = engine.state(engine.state_shapes())
    change(other)
    fresh = make_engine(World(), "plain", 1, ds_configs)
    with pytest.raises(ConfigError, match=complaint):
        fresh.load_state(other)
    assert differences(numpy_state(fresh), before) == []


def test_a_state_is_a_copy(ds_configs):
    engine = make_engine(World(), "plain", 1, ds_configs)
    state = numpy_state(engine)
    before = {key: array.copy() for key, array in state.items()}
    update(engine, World(), 0)
    assert differences(state, before) == []
    assert set(differences(numpy_state(engine), before)) == before.keys() - {"loss_scale"}


# A step that is not finite.


@pytest.mark.parametrize(
    ("settings", "poison"),
    [
        ({}, "images"),
        ({}, "loss"),
        ({"precision": "fp16"}, "images"),
        ({"precision": "bf16", "batch_norm": "synchronized"}, "images"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(world_size, settings, poison, ds_configs):
    loss_scale = CALM_SCALE if settings.get("precision") == "fp16" else 1.0
    for found in run_on_ranks(world_size, skips, shardings_on(world_size), settings, poison, ds_configs):
        for sharding, skip in found.items():
            assert skip.result.skipped, sharding
            assert not math.isfinite(skip.result.grad_norm), sharding
            assert skip.result.loss_scale == loss_scale, sharding
            # All that fp16 learns is that its scale was too high.
            assert skip.changed_at_once == (["loss_scale"] if loss_scale > 1 else []), sharding
            assert skip.next_loss_scale == max(loss_scale / 2, 1), sharding
            assert skip.changed_later == skip.changed_at_once, sharding


@dataclasses.dataclass
class Skip:
    """changed_later: how an update later the state differs from that of a run without the step."""

    result: StepResult
    changed_at_once: list[str]
    changed_later: list[str]
    next_loss_scale: float


def skips(world: World, shardings: list[str], settings: dict, poison: str, ds_configs: str) -> dict[str, Skip]:
    found = {}
    for sharding in shardings:
        undisturbed, engine = (make_engine(world, sharding, 2, ds_configs, settings=settings) for _ in range(2))
        for each in (engine, undisturbed):
            each.load_state({**tensors(numpy_state(each)), "loss_scale": torch.tensor([CALM_SCALE, 0.0])})
            update(each, world, 0)
        before = {**numpy_state(engine), **local_buffers(engine)}
        _, result = update(engine, world, 1, poison)
        after = {**numpy_state(engine), **local_buffers(engine)}
        next_results = [update(each, world, 2)[1] for each in (engine, undisturbed)]
        assert not any(next_result.skipped for next_result in next_results)
        found[sharding] = Skip(
            result,
            differences(after, before),
            differences(numpy_state(engine), numpy_state(undisturbed)),
            next_results[0].loss_scale,
        )
    return found


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_trying_an_update_out_changes_nothing(world_size, settings, ds_configs):
    for found in run_on_ranks(world_size, trials, shardings_on(world_size), settings, ds_configs):
        for sharding, changed in found.items():
            assert changed == ([], []), sharding


def trials(world: World, shardings: list[str], settings: dict, ds_configs: str) -> dict[str, tuple[list, list]]:
    """By sharding: what differs after the trial, and after two updates more from a run without one."""
    found = {}
    for sharding in shardings:
        untried, engine = (make_engine(world, sharding, 2, ds_configs, settings=settings) for _ in range(2))
        before = {**numpy_state(engine), **local_buffers(engine)}
        images, labels = micro_batch(9, world.rank, 2 * world.world_size)
        engine.try_out(partial(tried_loss, engine, images, labels))
        at_once = differences({**numpy_state(engine), **local_buffers(engine)}, before)
        for each in (engine, untried):
            for step in range(2):
                update(each, world, step)
        found[sharding] = at_once, differences(numpy_state(engine), numpy_state(untried))
    return found


def tried_loss(engine: Engine, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss_of(engine.forward(images), labels)


def test_fp16_finds_a_scale_at_which_its_gradients_are_finite(ds_configs):
    (found,) = run_on_ranks(1, searches, shardings_on(1), ds_configs)
    for results in found.values():
        assert_scale_found(results)


def assert_scale_found(results: list[StepResult]) -> None:
    skips = sum(result.skipped for result in results)
    assert 0 < skips < len(results)
    assert [result.skipped for result in results] == [True] * skips + [False] * (len(results) - skips)
    assert [result.loss_scale for result in results[: skips + 1]] == [2.0 ** (40 - skip) for skip in range(skips + 1)]


def searches(world: World, shardings: list[str], ds_configs: str) -> dict[str, list[StepResult]]:
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 1, ds_configs, settings={"precision": "fp16"})
        engine.load_state({**tensors(numpy_state(engine)), "loss_scale": torch.tensor([2.0**40, 0.0])})
        found[sharding] = [update(engine, world, step)[1] for step in range(30)]
    return found


# Moving average, evaluation.


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_moving_average_follows_its_formula_under_every_engine(world_size, ds_configs):
    shardings = shardings_on(world_size)
    histories = run_on_ranks(world_size, state_histories, shardings, ds_configs)[0]
    for sharding, states in histories.items():
        for before, after in itertools.pairwise(states):
            for key in [key for key in after if key.startswith("ema/")]:
                name = key.removeprefix("ema/")
                weight = after.get(f"weight/{name}", after.get(f"buffer/{name}"))
                if weight.dtype == np.int64:  # a counter has no average
                    assert after[key] == weight
                    continue
                expected = 0.7 * before[key] + 0.3 * weight
                np.testing.assert_allclose(after[key], expected, rtol=1e-5, atol=1e-7, err_msg=f"{sharding} {key}")
        assert (
            differences(
                {"average": states[0]["ema/model.cls.weight"]}, {"average": states[0]["weight/model.cls.weight"]}
            )
            == []
        )


def state_histories(world: World, shardings: list[str], ds_configs: str) -> dict[str, list[State]]:
    histories = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 1, ds_configs)
        histories[sharding] = [numpy_state(engine)]
        for step in range(2):
            update(engine, world, step)
            histories[sharding].append(numpy_state(engine))
    return histories


@pytest.mark.parametrize("world_size", [1, 2])
def test_within_averaged_the_network_computes_with_the_average(world_size, ds_configs):
    for found in run_on_ranks(world_size, averaged_logits, shardings_on(world_size), ds_configs):
        for sharding, (logits, expected, restored, raw) in found.items():
            np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-7, err_msg=sharding)
            assert np.array_equal(restored, raw), sharding
            assert not np.allclose(raw, expected, rtol=1e-2), sharding


def averaged_logits(world: World, shardings: list[str], ds_configs: str) -> dict[str, list[np.ndarray]]:
    """By sharding: logits of the average, the same by hand, those of the weights afterwards and before."""
    images, _ = micro_batch(0, 0, 1)
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, ds_configs)
        for step in range(2):
            update(engine, world, step)
        engine.module.eval()
        with torch.no_grad():
            raw = engine.forward(images).cls
            with engine.averaged():
                logits = engine.forward(images).cls
            restored = engine.forward(images).cls
        expected = logits_by_hand(numpy_state(engine), "ema")
        found[sharding] = [logits.numpy(), expected, restored.numpy(), raw.numpy()]
    return found


def test_without_an_average_there_is_nothing_to_compute_with(ds_configs):
    engine = make_engine(World(), "plain", 1, ds_configs, ema_decay=None)
    assert not any(key.startswith("ema/") for key in engine.state_shapes())
    with pytest.raises(RuntimeError, match=r"no moving average.*optim\.ema_decay"), engine.averaged():
        pass


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluating_between_updates_changes_nothing(world_size, ds_configs):
    for different in run_on_ranks(world_size, evaluations, shardings_on(world_size), ds_configs):
        assert different == {sharding: [] for sharding in shardings_on(world_size)}


def evaluations(world: World, shardings: list[str], ds_configs: str) -> dict[str, list[str]]:
    found = {}
    for sharding in shardings:
        states = []
        for evaluates in (False, True):
            engine = make_engine(world, sharding, 2, ds_configs)
            for step in range(3):
                update(engine, world, step)
                if evaluates:
                    evaluate_both(engine)
            states.append(numpy_state(engine))
        found[sharding] = differences(*states)
    return found


def evaluate_both(engine: Engine) -> None:
    """The weights, then their average, which being asked to stop leaves in order too."""
    engine.module.eval()
    with torch.no_grad():
        for part in range(3):
            engine.forward(micro_batch(100, part, 4)[0])
        with contextlib.suppress(Stopped), engine.averaged():
            engine.forward(micro_batch(100, 3, 4)[0])
            raise Stopped(1, None)
    engine.module.train()


def test_a_step_before_the_last_micro_step_is_an_error(ds_configs):
    engine = make_engine(World(), "plain", 2, ds_configs)
    images, labels = micro_batch(0, 0, 2)
    engine.backward(loss_of(engine.forward(images), labels))
    with pytest.raises(RuntimeError, match="step after 1 backward calls, an update takes 2"):
        engine.step(LR)


def test_the_setting_and_the_table_name_the_same_engines():
    assert get_args(get_type_hints(EngineConfig)["name"]) == tuple(ENGINES)
    assert get_args(get_type_hints(EngineConfig)["precision"]) == ("auto", *get_args(Precision))


def test_plain_is_refused_on_two_ranks():
    config = RunConfig(engine=EngineConfig(name="plain"))
    with pytest.raises(ConfigError, match=r"one process and there are 2; set engine\.name to zero or fsdp2"):
        prepare_engine(config, World(0, 0, 2, 2))


# The same work in less memory.


def test_checkpointed_activations_give_the_same_bits_with_drop_path_too(ds_configs):
    (found,) = run_on_ranks(
        1, with_and_without_checkpointing, ["plain", "zero1", "zero3 all apart", "fsdp2"], ds_configs
    )
    for sharding, (different, forwards) in found.items():
        assert different == [], sharding
        assert forwards == [2, 4], sharding


def dropping_cit() -> Network:
    return tiny_cit(drop_path_rate=0.5)


def with_and_without_checkpointing(world: World, shardings: list[str], ds_configs: str) -> dict:
    """By sharding: what differs after two updates, and how often the last block was computed in the first."""
    found = {}
    for sharding in shardings:
        states, forwards = [], []
        for checkpoints in (False, True):
            settings = {"activation_checkpointing": checkpoints}
            engine = make_engine(world, sharding, 2, ds_configs, dropping_cit, settings)
            calls = []
            handle = engine.module.model.blocks[-1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            torch.manual_seed(1)
            update(engine, world, 0)
            forwards.append(len(calls))
            handle.remove()
            update(engine, world, 1)
            states.append(numpy_state(engine))
        found[sharding] = (differences(*states), forwards)
    return found


class Plain(nn.Linear):
    """A model that cannot compute its layers again."""

    pretrained_cfg = TinyModel.pretrained_cfg


def headless_network():
    return Network(Plain(3, 2))


@pytest.mark.parametrize(
    ("make_network", "complaint"),
    [
        (tiny_network, "TinyModel has BatchNorm where it would be computed twice"),
        (headless_network, "Plain cannot checkpoint its activations"),
    ],
)
def test_checkpointing_is_refused_where_it_cannot_be(make_network, complaint, ds_configs):
    with pytest.raises(ConfigError, match=f"{complaint}; set engine.activation_checkpointing=false"):
        make_engine(World(), "plain", 1, ds_configs, make_network, {"activation_checkpointing": True})


def test_checkpointing_is_of_the_student_and_not_of_its_teachers():
    config = RunConfig(
        teachers={"conv": TeacherConfig(model="regnety_004", recipe="deit")},
        engine=EngineConfig(precision="bf16", activation_checkpointing=True),
    )
    assert resolve_teacher_runs(config, Given((), frozenset()))["conv"].config.engine == EngineConfig(precision="bf16")


def patience_of_every_group(world, sharding, ds_configs):
    """Seconds for which the collectives of each process group wait, and that the engine computes."""
    engine = make_engine(world, sharding, 1, ds_configs)
    update(engine, world, 0)
    found = dist.distributed_c10d._world.pg_map
    groups = [group for group in found if group is not dist.group.WORLD]  # that of the tests' own ranks
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize("sharding", ["zero1", "zero3", "fsdp2"])
def test_no_group_of_an_engine_gives_up_while_a_suspended_job_does_not_run(sharding, ds_configs):
    for patiences in run_on_ranks(2, patience_of_every_group, sharding, ds_configs):
        assert bool(patiences) == (sharding != "fsdp2")
        assert set(patiences) <= {ENDLESS_S}
