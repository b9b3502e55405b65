import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cit_scale.batch import StudentLogits, student_logits_type
from cit_scale.config import EngineConfig, MixingConfig, OptimConfig, RunConfig, TrainConfig
from cit_scale.engines.base import Engine, StepResult
from cit_scale.engines.build import build_engine, check_engine
from cit_scale.engines.zero import read_ds_config
from cit_scale.errors import ConfigError
from cit_scale.models.network import Network, build_network
from cit_scale.world import World

GLOBAL_BATCH_SIZE = 16
LR = 1e-2

# The shipped files, and two that reach what a network this small does not: flat partitions in another order with gaps,
# and shards that are really apart, in several groups.
SHARDINGS = {
    "zero0": "zero0",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero2 in another order": {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True},
    "zero3 all apart": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 50},
}

State = dict[str, np.ndarray]


class TinyNetwork(nn.Module):
    """A convolution, BatchNorm, linear layers, an exempt token; no size is a multiple of two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5, 7)
        self.token = nn.Parameter(torch.randn(1, 7))
        self.cls = nn.Linear(7, 3)
        self.advised = nn.Linear(7, 3)

    def forward(self, images: Tensor) -> StudentLogits:
        features = torch.relu(self.norm(self.conv(images))).mean(dim=(2, 3))  # (B, 5)
        features = torch.tanh(self.hidden(features)) + self.token
        return student_logits_type(("conv",))(self.cls(features), self.advised(features))

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def tiny_cit() -> Network:
    """An aligned CiT for the same images, one patch for each four pixels."""
    sizes = {"patch_size": 2, "depth": 2, "embed_dim": 24, "num_heads": 2}
    return build_network("cit_tiny_patch16_224", sizes, num_classes=3, image_size=6, teachers=("conv",))


def make_engine(
    world: World, sharding: str, micro_steps: int, folder: str, make_network=TinyNetwork, **optim: float
) -> Engine:
    """A fresh engine with the same initial weights each time. sharding: a row of SHARDINGS, or plain."""
    config = RunConfig(
        optim=OptimConfig(**{"weight_decay": 0.1, "clip_norm": 0.3, "ema_decay": 0.7, **optim}),
        engine=engine_config(sharding, folder),
        mixing=MixingConfig(group_size=1),
        train=TrainConfig(
            global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=GLOBAL_BATCH_SIZE // world.world_size // micro_steps
        ),
    )
    torch.manual_seed(0)
    return build_engine(make_network(), config, world, micro_steps)


def engine_config(sharding: str, folder: str) -> EngineConfig:
    if sharding == "plain":
        return EngineConfig(name="plain")
    if isinstance(SHARDINGS[sharding], str):
        return EngineConfig(ds_config=sharding)
    return EngineConfig(ds_config=f"{folder}/{sharding}.json")


def micro_batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Part ``part`` of the global batch of ``step``, cut into ``parts``: images and labels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(GLOBAL_BATCH_SIZE, 3, 6, 6, generator=generator)
    labels = torch.randint(3, (GLOBAL_BATCH_SIZE,), generator=generator)
    return images.chunk(parts)[part], labels.chunk(parts)[part]


def loss_of(logits: StudentLogits, labels: Tensor) -> Tensor:
    return cross_entropy(logits.cls, labels) + cross_entropy(logits.conv, labels)


def update(engine: Engine, world: World, step: int, poison: str | None = None) -> tuple[list[float], StepResult]:
    """One update on this rank's part of the global batch. Returns the loss of each micro-step and the result.

    poison: what goes wrong in the first micro-step of the last rank.
    """
    losses = []
    for micro_step in range(engine.micro_steps):
        part = world.rank * engine.micro_steps + micro_step
        images, labels = micro_batch(step, part, world.world_size * engine.micro_steps)
        poisoned = poison if world.rank == world.world_size - 1 and micro_step == 0 else None
        if poisoned == "images":
            images = torch.full_like(images, math.nan)
        loss = loss_of(engine.forward(images), labels)
        if poisoned == "loss":
            loss = loss * math.inf
        engine.backward(loss)
        losses.append(loss.item())
    return losses, engine.step(LR)


def numpy_state(engine: Engine) -> State:
    return {key: tensor.numpy() for key, tensor in engine.state().items()}


def tensors(state: State) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in state.items()}


def differences(left: State, right: State) -> list[str]:
    """Keys whose bits differ."""
    keys = left.keys() | right.keys()
    return sorted(
        key for key in keys if key not in left or key not in right or left[key].tobytes() != right[key].tobytes()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Where the rows of SHARDINGS that are not shipped stand as files."""
    folder = tmp_path_factory.mktemp("ds_configs")
    for name, zero in SHARDINGS.items():
        if isinstance(zero, dict):
            (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    return str(folder)


# Every engine does the arithmetic of plain.


@dataclasses.dataclass
class Trajectory:
    """Three updates. losses: by step, then by part of the global batch in its order."""

    losses: list[list[float]]
    grad_norms: list[float]
    state: State


def trajectories(world: World, shardings: list[str], micro_steps: list[int], folder: str) -> dict:
    """On one rank: each case's own losses, grad norms and state."""
    found = {}
    for sharding in shardings:
        for micro in micro_steps:
            engine = make_engine(world, sharding, micro, folder)
            updates = [update(engine, world, step) for step in range(3)]
            found[sharding, micro] = Trajectory(
                [losses for losses, _ in updates], [result.grad_norm for _, result in updates], numpy_state(engine)
            )
    return found


@pytest.fixture(scope="module")
def plain(folder) -> dict[int, Trajectory]:
    """By the number of parts that the global batch is cut into."""
    (found,) = run_on_ranks(1, trajectories, ["plain"], [1, 2, 4, 8], folder)
    return {parts: trajectory for (_, parts), trajectory in found.items()}


@pytest.fixture(scope="module", params=[1, 2])
def zero(request, folder) -> tuple[int, dict[tuple[str, int], Trajectory]]:
    """The number of ranks, and their common trajectory by sharding and micro-steps."""
    by_rank = run_on_ranks(request.param, trajectories, list(SHARDINGS), [1, 2, 4], folder)
    common = {}
    for case, first in by_rank[0].items():
        losses = [[loss for ranks in by_rank for loss in ranks[case].losses[step]] for step in range(3)]
        assert all(ranks[case].grad_norms == first.grad_norms for ranks in by_rank)
        common[case] = Trajectory(losses, first.grad_norms, first.state)
    return request.param, common


@pytest.mark.parametrize("micro_steps", [1, 2, 4])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_zero_has_the_losses_norms_weights_and_moments_of_plain(sharding, micro_steps, zero, plain):
    world_size, found = zero
    ours, expected = found[sharding, micro_steps], plain[world_size * micro_steps]
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=2e-6)
    np.testing.assert_allclose(ours.grad_norms, expected.grad_norms, rtol=2e-6)
    assert ours.state.keys() == expected.state.keys()
    for key, value in ours.state.items():
        # BatchNorm's running statistics are averaged over ranks and not accumulated one after the other.
        if f"buffer/{key.split('/')[-1]}" in ours.state and world_size > 1:
            continue
        # Another order of sums. AdamW divides by the gradient's size, which enlarges that in the weights.
        np.testing.assert_allclose(value, expected.state[key], rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("micro_steps", [1, 2, 4])
def test_zero0_on_one_rank_has_the_bits_of_plain(micro_steps, plain, folder):
    (found,) = run_on_ranks(1, trajectories, ["zero0"], [micro_steps], folder)
    assert differences(found["zero0", micro_steps].state, plain[micro_steps].state) == []


def cit_trajectory(world: World, sharding: str, micro_steps: int, folder: str) -> tuple[list[float], State]:
    engine = make_engine(world, sharding, micro_steps, folder, tiny_cit)
    losses = [loss for step in range(3) for loss in update(engine, world, step)[0]]
    return losses, numpy_state(engine)


@pytest.mark.parametrize("sharding", ["zero1", "zero3", "zero3 all apart"])
def test_a_student_on_two_ranks_has_the_losses_and_weights_of_plain(sharding, folder):
    ((losses, expected),) = run_on_ranks(1, cit_trajectory, "plain", 2, folder)
    (first, state), (second, _) = run_on_ranks(2, cit_trajectory, sharding, 1, folder)
    np.testing.assert_allclose([first, second], [losses[0::2], losses[1::2]], rtol=2e-6)
    for key in expected:
        if key.startswith("weight/"):
            np.testing.assert_allclose(state[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_accumulation_leaves_the_mean_gradient_where_it_was(folder):
    """Without BatchNorm between the images, the cut into micro-steps is no difference at all."""
    (norms,) = run_on_ranks(1, grad_norms_in_eval_mode, folder)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


def grad_norms_in_eval_mode(world: World, folder: str) -> list[float]:
    norms = []
    for micro_steps in (1, 2, 4):
        engine = make_engine(world, "plain", micro_steps, folder)
        engine.module.eval()
        norms.append(update(engine, world, 0)[1].grad_norm)
    return norms


@pytest.mark.parametrize("clip_norm", [0.01, 0.0])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_clipped_to_the_recipes_norm_and_the_norm_before_is_reported(world_size, clip_norm, folder):
    shardings = [*SHARDINGS, *(["plain"] if world_size == 1 else [])]
    (found, *_) = run_on_ranks(world_size, clipped_norms, shardings, clip_norm, folder)
    for sharding, (grad_norm, clipped) in found.items():
        assert grad_norm > 0.1, sharding
        assert clipped == pytest.approx(clip_norm or grad_norm, rel=1e-3), sharding


def clipped_norms(world: World, shardings: list[str], clip_norm: float, folder: str) -> dict[str, tuple[float, float]]:
    """By sharding: the norm that the step reports, and the norm of the gradient that AdamW saw."""
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, folder, clip_norm=clip_norm)
        _, result = update(engine, world, 0)
        # After the first update exp_avg is (1 - 0.9) times the gradient.
        moments = [value.ravel() for key, value in numpy_state(engine).items() if key.startswith("exp_avg/")]
        found[sharding] = (result.grad_norm, float(np.linalg.norm(np.concatenate(moments or [np.zeros(1)])) / 0.1))
    return found


def test_bf16_is_autocast_over_float32_weights_and_the_same_in_every_engine(folder):
    (found,) = run_on_ranks(1, bf16_losses, folder)
    exact = found.pop("float32")
    for sharding, (losses, dtypes) in found.items():
        assert dtypes == {torch.float32}, sharding
        np.testing.assert_allclose(losses, found["plain"][0], rtol=1e-5, err_msg=sharding)
        np.testing.assert_allclose(losses, exact[0], rtol=1e-2)
        assert losses != exact[0], f"{sharding} did not compute in bf16"


def bf16_losses(world: World, folder: str) -> dict[str, tuple[list[float], set[torch.dtype]]]:
    """Losses of two updates, and the types of logits and weights."""
    found = {}
    for name in ["float32", "plain", *SHARDINGS]:
        engine_settings = engine_config("plain" if name == "float32" else name, folder)
        if name != "float32":
            engine_settings = dataclasses.replace(engine_settings, precision="bf16")
        config = RunConfig(engine=engine_settings, train=TrainConfig(global_batch_size=GLOBAL_BATCH_SIZE))
        torch.manual_seed(0)
        engine = build_engine(TinyNetwork(), config, world, 1)
        losses = [update(engine, world, step)[0][0] for step in range(2)]
        logits = engine.forward(micro_batch(0, 0, 1)[0])
        weights = [tensor for key, tensor in engine.state().items() if key.startswith("weight/")]
        found[name] = (losses, {tensor.dtype for tensor in (*logits, *weights)})
    return found


# What stands in a checkpoint is everything.


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loaded_engine_continues_with_the_bits_of_one_that_never_stopped(world_size, folder):
    shardings = [*SHARDINGS, *(["plain"] if world_size == 1 else [])]
    for different in run_on_ranks(world_size, continuations, shardings, folder):
        assert different == {sharding: ([], []) for sharding in shardings}


def continuations(world: World, shardings: list[str], folder: str) -> dict[str, tuple[list[str], list[str]]]:
    """By sharding: where an engine that was loaded differs from one that went on, if it was fresh and if it had run."""
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, folder)
        for step in range(2):
            update(engine, world, step)
        saved = share(world, numpy_state(engine))
        for step in range(2, 4):
            update(engine, world, step)
        undisturbed = numpy_state(engine)

        fresh = make_engine(world, sharding, 2, folder)
        used = make_engine(world, sharding, 2, folder)
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


def share(world: World, state: State) -> State:
    """Collective. Rank 0's state on every rank, as a checkpoint on a shared disk would be."""
    box = [state]
    torch.distributed.broadcast_object_list(box)
    return box[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_goes_into_every_other_engine_and_out_again_unchanged(world_size, zero, plain, folder):
    _, found = zero  # written on 1 or 2 ranks
    states = {"plain": plain[2].state, **{sharding: found[sharding, 2].state for sharding in SHARDINGS}}
    shardings = [*SHARDINGS, *(["plain"] if world_size == 1 else [])]
    (reports, *_) = run_on_ranks(world_size, crossings, states, shardings, folder)
    for crossing, (different, steps, logits, expected) in reports.items():
        assert different == [], crossing
        assert steps == 3, crossing
        np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-7, err_msg=str(crossing))


def crossings(world: World, states: dict[str, State], shardings: list[str], folder: str) -> dict:
    """Each state in each engine: what comes out differently, the step count, the first logits, what these should be."""
    images, _ = micro_batch(0, 0, 1)
    found = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 2, folder)
        for source, state in states.items():
            engine.load_state(tensors(state))
            engine.module.eval()
            with torch.no_grad():
                logits = engine.forward(images).cls
            out = numpy_state(engine)
            found[source, sharding] = (
                differences(out, state) if world.is_main else [],
                int(out.get("optimizer_step", 0)),
                logits.numpy(),
                logits_by_hand(state, images).numpy(),
            )
    return found


def logits_by_hand(state: State, images: Tensor) -> Tensor:
    network = TinyNetwork().eval()
    arrays = {key.split("/")[1]: array for key, array in state.items() if key.startswith(("weight/", "buffer/"))}
    network.load_state_dict(tensors(arrays))
    with torch.no_grad():
        return network(images).cls


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("exp_avg/token"), "exp_avg/token is missing"),
        (lambda state: state.update({"weight/extra": torch.zeros(1)}), "weight/extra is not known here"),
        (lambda state: state.update({"weight/cls.bias": torch.zeros(4)}), r"weight/cls.bias is \(4,\), here \(3,\)"),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("ema/")], "ema/conv.weight is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(change, complaint, folder):
    engine = make_engine(World(), "plain", 1, folder)
    before = numpy_state(engine)
    update(engine, World(), 0)
    other = engine.state()
    change(other)
    fresh = make_engine(World(), "plain", 1, folder)
    with pytest.raises(ConfigError, match=complaint):
        fresh.load_state(other)
    assert differences(numpy_state(fresh), before) == []


def test_a_state_is_a_copy(folder):
    engine = make_engine(World(), "plain", 1, folder)
    state = numpy_state(engine)
    before = {key: array.copy() for key, array in state.items()}
    update(engine, World(), 0)
    assert differences(state, before) == []
    assert len(differences(numpy_state(engine), before)) == len(before)


# A step that is not finite.


@pytest.mark.parametrize("poison", ["images", "loss"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(world_size, poison, folder):
    shardings = [*SHARDINGS, *(["plain"] if world_size == 1 else [])]
    for found in run_on_ranks(world_size, skips, shardings, poison, folder):
        for sharding, (result, changed_at_once, changed_later) in found.items():
            assert result.skipped, sharding
            assert not math.isfinite(result.grad_norm), sharding
            assert changed_at_once == [], sharding
            assert changed_later == [], sharding


def skips(world: World, shardings: list[str], poison: str, folder: str) -> dict[str, tuple[StepResult, list, list]]:
    """By sharding: the poisoned step's result, what it changed, how an update later differs from a run without it."""
    found = {}
    for sharding in shardings:
        undisturbed = make_engine(world, sharding, 2, folder)
        engine = make_engine(world, sharding, 2, folder)
        for each in (engine, undisturbed):
            update(each, world, 0)
        before = {**numpy_state(engine), **local_buffers(engine)}
        _, result = update(engine, world, 1, poison)
        after = {**numpy_state(engine), **local_buffers(engine)}
        for each in (engine, undisturbed):
            _, next_result = update(each, world, 2)
            assert not next_result.skipped
        found[sharding] = (
            result, differences(after, before), differences(numpy_state(engine), numpy_state(undisturbed))
        )  # fmt: skip
    return found


def local_buffers(engine: Engine) -> State:
    """This rank's own, beside rank 0's in the state."""
    return {f"local/{name}": buffer.numpy().copy() for name, buffer in engine.module.named_buffers()}


# BatchNorm, moving average, evaluation.


def test_running_statistics_are_the_mean_over_ranks_and_the_same_everywhere(folder):
    first, second = run_on_ranks(2, statistics_after_one_update, folder)
    for sharding in SHARDINGS:
        assert differences(first[sharding], second[sharding]) == [], sharding
        expected = np.mean([first["by hand"], second["by hand"]], axis=0)
        np.testing.assert_allclose(first[sharding]["local/norm.running_mean"], expected, rtol=1e-5)
        assert first[sharding]["local/norm.num_batches_tracked"] == 1
    assert not np.allclose(first["by hand"], second["by hand"], rtol=1e-3)


def statistics_after_one_update(world: World, folder: str) -> dict:
    found = {}
    for sharding in SHARDINGS:
        engine = make_engine(world, sharding, 1, folder)
        update(engine, world, 0)
        found[sharding] = local_buffers(engine)
    torch.manual_seed(0)
    with torch.no_grad():
        features = TinyNetwork().conv(micro_batch(0, world.rank, 2)[0])
    found["by hand"] = 0.1 * features.mean(dim=(0, 2, 3)).numpy()  # momentum 0.1, from 0
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_moving_average_follows_its_formula_under_every_engine(world_size, folder):
    shardings = [*SHARDINGS, *(["plain"] if world_size == 1 else [])]
    histories = run_on_ranks(world_size, state_histories, shardings, folder)[0]
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
        assert differences({"average": states[0]["ema/cls.weight"]}, {"average": states[0]["weight/cls.weight"]}) == []


def state_histories(world: World, shardings: list[str], folder: str) -> dict[str, list[State]]:
    histories = {}
    for sharding in shardings:
        engine = make_engine(world, sharding, 1, folder)
        histories[sharding] = [numpy_state(engine)]
        for step in range(2):
            update(engine, world, step)
            histories[sharding].append(numpy_state(engine))
    return histories


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluating_between_updates_changes_nothing(world_size, folder):
    for different in run_on_ranks(world_size, evaluations, folder):
        assert different == {sharding: [] for sharding in SHARDINGS}


def evaluations(world: World, folder: str) -> dict[str, list[str]]:
    found = {}
    for sharding in SHARDINGS:
        states = []
        for evaluates in (False, True):
            engine = make_engine(world, sharding, 2, folder)
            for step in range(3):
                update(engine, world, step)
                if evaluates:
                    engine.module.eval()
                    with torch.no_grad():
                        for part in range(3):
                            engine.forward(micro_batch(100, part, 4)[0])
                    engine.module.train()
            states.append(numpy_state(engine))
        found[sharding] = differences(*states)
    return found


def test_a_step_before_the_last_micro_step_is_an_error(folder):
    (message,) = run_on_ranks(1, step_too_early, folder)
    assert message == "step after 1 backward calls, an update takes 2"


def step_too_early(world: World, folder: str) -> str:
    engine = make_engine(world, "zero1", 2, folder)
    images, labels = micro_batch(0, 0, 2)
    engine.backward(loss_of(engine.forward(images), labels))
    with pytest.raises(RuntimeError) as error:
        engine.step(LR)
    return str(error.value)


# What is refused, and how it is said.


def run_config(tmp_path: Path, ds_config: dict | str) -> RunConfig:
    if isinstance(ds_config, dict):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(ds_config))
        ds_config = str(path)
    return RunConfig(engine=EngineConfig(ds_config=ds_config), optim=OptimConfig(clip_norm=15.0, lr=1e-3))


@pytest.mark.parametrize(
    ("ds_config", "complaints"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping=1.0", "recipe says 15.0", "optim.clip_norm"]),
        ({"train_batch_size": 512}, ["train_batch_size=512", "says 1024", "train.global_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 32}, ["=32", "says 256", "train.micro_batch_size"]),
        ({"gradient_accumulation_steps": 8}, ["=8", "says 2", "train.micro_batch_size"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "says false", "engine.precision"]),
        ({"fp16": {"enabled": "auto", "loss_scale": 0}}, ["fp16.loss_scale=0", "remove it"]),
        ({"optimizer": {"type": "Adam"}}, ['optimizer.type="Adam"', 'says "AdamW"']),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, ["params.lr=0.0003", "says 0.001", "optim.lr"]),
        ({"scheduler": {"type": "WarmupLR"}}, ['scheduler.type="WarmupLR"', "cosine", "optim.warmup_epochs"]),
        ({"zero_optimisation": {"stage": 2}}, ["unknown key 'zero_optimisation'; the nearest", "zero_optimization,"]),
        ({"zero_optimization": {"stge": 2}}, ["zero_optimization: unknown key 'stge'; the nearest", "stage,"]),
        ({"zero_optimization": {"leaf_module": {"clases": []}}}, ["leaf_module: unknown key 'clases'", "classes,"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4"]),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, ['zero_optimization.reduce_bucket_size="big"']),
        ({"zero_optimization": 1}, ["zero_optimization=1 must be an object"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm=false", "says true"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer is not supported yet"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ["hpz_partition_size is not supported"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["offload_optimizer is not supported yet"]),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none", "ratio": 0.5}}},
            ["Partial offloading only supported for ZeRO Stage 3"],
        ),
        ("zero7", ["engine.ds_config=zero7", "zero0, zero1, zero2, zero3"]),
    ],
)  # fmt: skip
def test_a_ds_config_that_contradicts_the_recipe_or_is_misspelt_is_refused_in_one_line(ds_config, complaints, tmp_path):
    with pytest.raises(ConfigError) as error:
        read_ds_config(run_config(tmp_path, ds_config), world_size=2, micro_steps=2)
    assert "\n" not in str(error.value)
    for complaint in complaints:
        assert complaint in str(error.value)


def test_a_ds_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text("{'stage': 1}")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_ds_config(run_config(tmp_path, str(tmp_path / "mine.json")), 1, 1)


def test_a_ds_config_may_repeat_the_recipe_or_say_auto(tmp_path):
    repeated = {
        "train_batch_size": 1024,
        "train_micro_batch_size_per_gpu": 256,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 15,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "weight_decay": 0.05}},
        "scheduler": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "steps_per_print": 10,
    }
    alone = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "steps_per_print": 10}
    both = [read_ds_config(run_config(tmp_path, config), 2, 2) for config in (repeated, alone)]
    assert both[0] == both[1]
    assert both[0]["train_batch_size"] == 1024
    assert both[0]["gradient_clipping"] == 15.0


def test_bf16_in_a_ds_config_is_the_recipes_bf16(tmp_path):
    config = run_config(tmp_path, {"bf16": {"enabled": True}})
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
    assert "bf16" not in read_ds_config(config, 1, 1)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_the_shipped_files_say_how_to_shard_and_nothing_else(name, tmp_path):
    path = Path(read_ds_config.__globals__["DS_CONFIGS"]) / f"{name}.json"
    assert json.loads(path.read_text()).keys() == {"zero_optimization"}
    assert read_ds_config(run_config(tmp_path, name), 1, 1)["zero_optimization"]["stage"] == int(name[-1])


def test_compiling_under_zero3_is_refused():
    config = RunConfig(engine=EngineConfig(ds_config="zero3", compile=True))
    with pytest.raises(ConfigError, match="take stage 0, 1 or 2"):
        read_ds_config(config, 1, 1)


def test_plain_is_refused_on_two_ranks():
    config = RunConfig(engine=EngineConfig(name="plain"))
    with pytest.raises(ConfigError, match=r"one process and there are 2; set engine\.name=zero"):
        check_engine(config, World(0, 0, 2, 2))
