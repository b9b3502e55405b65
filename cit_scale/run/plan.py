"""What a prepared run will do and need: micro-steps, steps, checkpoints, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from cit_scale.config import EngineConfig, RunConfig
from cit_scale.engines.activation_checkpointing import blocks_of, checkpoint_activations
from cit_scale.engines.base import EngineSetup
from cit_scale.models.network import UNTRIED, Network, fake_state, tensors_of
from cit_scale.run.setup import PreparedRun
from cit_scale.settings import decided

FLOAT32_BYTES = 4
MOST_CLASSES = 6  # of the rarest, and of the most frequent, that the plan lists
GIB = 2**30


@dataclass(frozen=True)
class Sharding:
    """Which parts of the training state the ranks hold in shares, and which lie in the CPU's memory.

    copies_weights: ZeRO updates a copy of its share of the weights and leaves the module's own to the forward pass.
    """

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    copies_weights: bool = False
    offloads_weights: bool = False
    offloads_optimizer: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, in float32: the first six on its device, ``host`` in the CPU's memory.

    activations: what the forward pass of one micro-batch keeps for the backward pass. checkpoint: bytes on the disk.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    teachers: int
    activations: int
    host: int
    checkpoint: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.moments + self.average + self.teachers + self.activations


@dataclass(frozen=True)
class RunPlan:
    """A run in numbers. classes: with their images, in words. teachers: by name, the plan of each teacher that is
    trained first."""

    config: RunConfig
    world_size: int
    micro_batch_size: int
    micro_steps: int
    train_images: int
    classes: str
    steps_per_epoch: int
    total_steps: int
    memory: Memory
    teachers: dict[str, RunPlan]
    repeats_together: float
    """``share_together`` of the first epoch."""

    @property
    def checkpoints_kept(self) -> int:
        """How many checkpoints the finished run has, at most: the best and the kept multiples may be among the last."""
        train = self.config.train
        for_good = self.total_steps // train.keep_every_steps if train.keep_every_steps else 0
        best = train.keep_best * (1 if self.config.optim.ema_decay is None else 2)
        return train.keep_last + for_good + best


def plan_run(prepared: PreparedRun) -> RunPlan:
    """The plan of a prepared run, and of the teachers' runs in it."""
    config, cut = prepared.config, prepared.batch_split
    memory = estimate_memory(prepared)
    return RunPlan(
        config=config,
        world_size=prepared.world.world_size,
        micro_batch_size=cut.micro_batch_size,
        micro_steps=cut.micro_steps,
        train_images=len(prepared.train_set),
        classes=classes_text(prepared),
        steps_per_epoch=prepared.steps_per_epoch,
        total_steps=prepared.total_steps,
        memory=memory,
        teachers={name: plan_run(teacher_run) for name, teacher_run in prepared.teacher_runs.items()},
        repeats_together=prepared.repeats_together,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def estimate_memory(prepared: PreparedRun) -> Memory:
    """Memory of one rank. Needs neither a GPU nor that memory: the networks are built on the meta device."""
    config, world_size, split = prepared.config, prepared.world.world_size, prepared.batch_split
    images_shape = (split.micro_batch_size, 3, config.data.image_size, config.data.image_size)
    network, teachers = prepared.build_on_meta()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    frozen = sum(tensor.numel() for name, tensor in network.named_buffers() if name in network.frozen)
    sharding = read_sharding(prepared.engine_setup)
    return dataclasses.replace(
        state_memory(parameters, sharding, world_size, has_average=config.optim.ema_decay is not None, frozen=frozen),
        teachers=sum(tensor.nbytes for teacher in teachers for tensor in tensors_of(teacher).values())
        + max((passing_bytes(teacher, images_shape) for teacher in teachers), default=0),
        activations=activation_bytes(network, config.engine, images_shape),
    )


def read_sharding(setup: EngineSetup) -> Sharding:
    """Which parts of the training state the engine shards, and which it keeps in the CPU's memory."""
    match setup.engine.name:
        case "fsdp2":
            # Gradients are reduced once an update; over several micro-steps each rank adds them up whole.
            return Sharding(weights=True, gradients=setup.batch_split.micro_steps == 1, optimizer=True)
        case "zero":
            assert setup.ds_config is not None
            zero = setup.ds_config["zero_optimization"]
            stage = zero["stage"]
            offloads_optimizer = _is_offloaded(zero, "offload_optimizer")
            return Sharding(
                weights=stage == 3,
                gradients=stage >= 2,
                optimizer=stage >= 1,
                # At stage 3 the shares are what is updated, unless that happens elsewhere.
                copies_weights=stage in (1, 2) or (stage == 3 and offloads_optimizer),
                offloads_weights=_is_offloaded(zero, "offload_param"),
                offloads_optimizer=offloads_optimizer,
            )
        case "plain":
            return Sharding()


def _is_offloaded(zero: dict, section: str) -> bool:
    return (zero.get(section) or {}).get("device") == "cpu"


def state_memory(parameters: int, sharding: Sharding, world_size: int, *, has_average: bool, frozen: int = 0) -> Memory:
    """Memory of the training state: without teachers and activations. parameters: number of those that are trained.
    frozen: of the others, which each rank holds whole, without gradient and moments.
    """
    kept = frozen * FLOAT32_BYTES
    whole = parameters * FLOAT32_BYTES
    share = -(-parameters // world_size) * FLOAT32_BYTES
    weights = share if sharding.weights else whole
    gradients = share if sharding.gradients else whole
    updated = share if sharding.optimizer else whole  # the part of the weights that this rank updates
    copy = updated if sharding.copies_weights else 0
    moments, average = 2 * updated, updated if has_average else 0
    host = 0
    if sharding.offloads_optimizer:
        host += gradients + moments + average + copy
        gradients = moments = average = copy = 0
    if sharding.offloads_weights:
        host += weights
        weights = 0
    return Memory(
        weights=weights + copy + kept,
        gradients=gradients,
        moments=moments,
        average=average,
        teachers=0,
        activations=0,
        host=host,
        checkpoint=whole * (4 if has_average else 3) + kept,  # weights, two moments, the average
    )


def activation_bytes(network: Network, engine: EngineConfig, images_shape: tuple[int, ...]) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the weights. Changes ``network`` in place.

    Autocast's copies of the weights in bf16 or fp16 are kept, too, and count.
    """
    network.train()
    network.precision = decided(engine.precision)
    kept = _fake_forward_bytes(network, images_shape)
    if engine.activation_checkpointing:
        checkpoint_activations(network)
        without, kept = kept, _fake_forward_bytes(network, images_shape)
        kept += (without - kept) // max(1, len(blocks_of(network)))  # one block at a time is computed again
    return kept


def _fake_forward_bytes(network: Network, images_shape: tuple[int, ...]) -> int:
    with FakeTensorMode():
        state = fake_state(network)
        return kept_for_backward(
            lambda images: torch.func.functional_call(network, state, (images,)),
            torch.empty(images_shape),
            state.values(),
        )


def passing_bytes(network: Network, images_shape: tuple[int, ...]) -> int:
    """Bytes that a forward pass without gradients takes at once, without the weights: the largest input and output of
    one layer. Images of another size are resized to the network's own first, which counts, too.
    """
    most = 0

    def count(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal most
        tensors = [each for each in (*inputs, output) if isinstance(each, Tensor)]
        most = max(most, sum(tensor.numel() * FLOAT32_BYTES for tensor in tensors))

    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with FakeTensorMode(), torch.no_grad():
            torch.func.functional_call(network.eval(), fake_state(network), (torch.empty(images_shape),))
    except UNTRIED:  # what follows from the values in the images is not counted
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return most


def kept_for_backward(forward: Callable[[Tensor], object], images: Tensor, state: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd holds after ``forward``, without the storages of ``state``."""
    known = {tensor.untyped_storage()._cdata for tensor in state}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(images)
    return sum(storage.nbytes() for storage in kept.values())


# ---------------------------------------------------------------------------------------------------------------------
# In words


def plan_lines(plan: RunPlan, device: str) -> list[str]:
    """The plan as lines of text. device: "GPU", or "rank" for ranks without one."""
    config, train = plan.config, plan.config.train
    share = plan.micro_batch_size * plan.micro_steps
    minutes = f" or {train.save_every_minutes:g} minutes" if train.save_every_minutes else ""
    lines = [
        ("run", f"{config.name} in {config.run_dir}"),
        (
            "update",
            f"{train.global_batch_size} images = {counted(plan.world_size, 'rank')} x "
            f"{counted(plan.micro_steps, 'micro-step')} x {counted(plan.micro_batch_size, 'image')}",
        ),
        (
            "epoch",
            f"{counted(plan.train_images, 'image')}, {counted(plan.steps_per_epoch, 'step')}; "
            f"a rank sees {share} images a step, {share * plan.steps_per_epoch} an epoch",
        ),
        *([("repeats", repeats_text(plan))] if config.augment.repeats > 1 else []),
        ("classes", plan.classes),
        ("training", f"{counted(train.epochs, 'epoch')}, {counted(plan.total_steps, 'step')}"),
        (
            "checkpoints",
            f"every {counted(train.save_every_steps, 'step')}{minutes}, about {plan.checkpoints_kept} kept, "
            f"{_size(plan.memory.checkpoint)} each",
        ),
        (f"memory per {device}", memory_text(plan.memory)),
    ]
    for name, teacher in config.teachers.items():
        if name in plan.teachers:
            run = plan.teachers[name]
            lines.append(
                (
                    f"teacher {name}",
                    f"{teacher.model} is trained first: {counted(run.total_steps, 'step')}, memory "
                    f"{memory_text(run.memory)}",
                )
            )
        else:
            lines.append((f"teacher {name}", f"{teacher.model} with weights {teacher.advises_with}"))
    return [row(what, text) for what, text in lines]


def repeats_text(plan: RunPlan) -> str:
    return (
        f"{plan.config.augment.repeats} of each image, by augment.repeats; {100 * plan.repeats_together:.0f} % of them "
        "share an update with another of their image"
    )


def classes_text(prepared: PreparedRun) -> str:
    """The classes with their images, and what data.balance and distill.class_weights make of them."""
    images, places, config = prepared.images_by_class, prepared.places_by_class, prepared.config
    balance, weights = config.data.balance, config.distill.class_weights

    def shown(name: str) -> str:
        return f"{name} {images[name]}" if balance == "none" else f"{name} {images[name]} -> {places[name]}"

    names = sorted(images, key=lambda name: images[name])
    if len(names) > 2 * MOST_CLASSES:
        listed = [*map(shown, names[:MOST_CLASSES]), "...", *map(shown, names[-MOST_CLASSES:])]
    else:
        listed = [*map(shown, names)]
    said = [
        f"{counted(len(names), 'class', 'classes')}: {', '.join(listed)}",
        f"images -> places in an epoch, by data.balance={balance}" if balance != "none" else "",
        f"weighed in the label loss by distill.class_weights={weights}" if weights != "none" else "",
    ]
    both = balance != "none" and weights != "none"
    return "; ".join(filter(None, said)) + (", so that a rare class counts by both" if both else "")


def arithmetic_text(prepared: PreparedRun, device: str) -> str:
    """Device, precision, compiled or not, sharding. device: its name."""
    engine, distill = prepared.config.engine, prepared.config.distill
    has_teachers = bool(prepared.config.teachers)
    precisions = engine.precision + (f" (teachers {distill.teacher_precision})" if has_teachers else "")
    compiled = ["student"] * bool(engine.compile) + ["teachers"] * (has_teachers and bool(distill.compile))
    ds_config = prepared.engine_setup.ds_config
    sharding = engine.name if ds_config is None else f"ZeRO stage {ds_config['zero_optimization']['stage']}"
    return (
        f"computes on {device} in {precisions}{', TF32 where float32' if engine.tf32 else ''}, "
        f"{' and '.join(compiled) or 'nothing'} compiled, under {sharding}"
    )


def row(what: str, text: str) -> str:
    return f"{what:<16} {text}"


def memory_text(memory: Memory) -> str:
    parts = ("weights", "gradients", "moments", "average", "teachers", "activations")
    listed = ", ".join(f"{part} {_size(getattr(memory, part))}" for part in parts if getattr(memory, part))
    host = f", and {_size(memory.host)} of the CPU's" if memory.host else ""
    return f"{_size(memory.device)}{host}, without workspace and fragmentation: {listed}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def counted(number: int, what: str, several: str = "") -> str:
    """several: the plural, where it is more than an s."""
    return f"{number} {what if number == 1 else several or f'{what}s'}"
