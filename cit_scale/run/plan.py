"""What a prepared run will do and need: micro-steps, steps, checkpoints, memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from cit_scale.batch import teacher_logits_type
from cit_scale.config import EngineConfig, RunConfig
from cit_scale.engines.activation_checkpointing import blocks_of, checkpoint_activations
from cit_scale.engines.base import EngineSetup
from cit_scale.losses import co_advise_loss
from cit_scale.models.network import AUTOCAST, UNTRIED, Network, fake_state, tensors_of
from cit_scale.run.live_bytes import LiveBytes
from cit_scale.run.setup import PreparedRun
from cit_scale.settings import decided

FLOAT32_BYTES = 4
MOST_CLASSES = 6  # of the rarest, and of the most frequent, that the plan lists
GIB = 2**30

WORKSPACE = GIB
"""What a GPU holds beside tensors. An assumption, not measured: a CUDA context with its kernels (about half of it),
workspaces of cuBLAS and cuBLASLt (32 MiB each on a Hopper, by PyTorch's CUDA notes), buffers of NCCL's channels."""

ZERO0_BUCKET = 500_000_000
"""Elements that DeepSpeed's engine.py reduces at once at stage 0 (MEMORY_OPT_ALLREDUCE_SIZE)."""

ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "contiguous_gradients": True,
    "max_live_parameters": 1_000_000_000,
    "prefetch_bucket_size": 50_000_000,
}
"""What decides on the size of ZeRO's buffers, in elements: DeepSpeed 0.19.8's defaults (runtime/zero/config.py)."""

CERTAINTY = "tensors within 20 % of steps on a CPU, not yet compared with a GPU's"
"""What tests/test_plan.py and docs/measurements/memory.md hold the estimate to."""


@dataclass(frozen=True)
class Sharding:
    """Which parts of the training state the ranks hold in shares, and which lie in the CPU's memory.

    copies_weights: ZeRO updates a copy of its share of the weights and leaves the module's own to the forward pass.
    keeps_gradients: there is room for them all the time, not only from the backward pass to the update.
    """

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    copies_weights: bool = False
    keeps_gradients: bool = False
    offloads_weights: bool = False
    offloads_optimizer: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: ``host`` in the CPU's memory, the others on its device. checkpoint: bytes on the disk.

    activations: what a micro-batch takes at the peak of its step, beside whole gradients: of the student's forward
    and backward pass, or of a teacher's forward pass, which comes before. buffers: what the engine gathers, reduces
    and copies at that peak. batches: images that are decoded, ready, in use and mixed. workspace: what is no tensor.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    host: int
    checkpoint: int
    teachers: int = 0
    activations: int = 0
    buffers: int = 0
    batches: int = 0
    workspace: int = 0

    @property
    def device(self) -> int:
        return sum(getattr(self, part) for part in ON_DEVICE)


ON_DEVICE = (
    "weights",
    "gradients",
    "moments",
    "average",
    "teachers",
    "activations",
    "buffers",
    "batches",
    "workspace",
)


@dataclass(frozen=True)
class Buffers:
    """Bytes that an engine takes beside the training state: during a backward pass, and during the update."""

    backward: int = 0
    update: int = 0


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
    config = prepared.config
    network, teachers = prepared.build_on_meta()
    for teacher in teachers:
        teacher.precision = decided(config.distill.teacher_precision)
    return dataclasses.replace(
        network_memory(network, teachers, prepared.engine_setup, config.data.image_size, prepared.num_classes),
        batches=batch_bytes(prepared),
        workspace=WORKSPACE,
    )


def network_memory(
    network: Network, teachers: Sequence[Network], setup: EngineSetup, image_size: int, num_classes: int
) -> Memory:
    """Memory of the networks and of the engine, without batches. Changes the networks in place.

    Steps are those of an eager network: what torch.compile fuses takes less. Teachers are counted with the BatchNorms
    that are folded later, and networks without their BatchNorms' statistics, both below 1 % of them.
    """
    split, sharding, buffers = setup.batch_split, read_sharding(setup), engine_buffers(setup, network)
    images_shape = (split.micro_batch_size, 3, image_size, image_size)
    state = state_memory(
        sum(parameter.numel() for parameter in network.parameters()),
        sharding,
        setup.world.world_size,
        has_average=setup.optim.ema_decay is not None,
        frozen=sum(tensor.numel() for name, tensor in network.named_buffers() if name in network.frozen),
    )
    has_gradients = sharding.gradients or split.micro_steps > 1
    student = student_bytes(network, setup.engine, images_shape, num_classes, has_gradients=has_gradients)
    passing = max((passing_bytes(teacher, images_shape) for teacher in teachers), default=0)
    # With a single micro-step gradients come while activations go: at the peak they are not there yet, or whole ones
    # are counted in ``student`` as far as they are.
    late = 0 if sharding.keeps_gradients or split.micro_steps > 1 else state.gradients
    held = max(student, passing) - late
    peak = max(held + buffers.backward, buffers.update, 0)
    activations = min(max(held, 0), peak)
    return dataclasses.replace(
        state,
        teachers=sum(tensor.nbytes for teacher in teachers for tensor in tensors_of(teacher).values()),
        activations=activations,
        buffers=peak - activations,
    )


def batch_bytes(prepared: PreparedRun) -> int:
    """Bytes of one rank's micro-batches on the device, when the pipeline is as far ahead as it may be.

    Images in float32: DALI's queue, the micro-batch in use, the mixed one; and one micro-batch as decoded, which is an
    assumption: all images at their mean size, as far as data.decoded_mib allows.
    """
    data, size, source = prepared.config.data, prepared.batch_split.micro_batch_size, prepared.train_set
    images = size * 3 * data.image_size**2 * FLOAT32_BYTES
    logits = size * prepared.num_classes * FLOAT32_BYTES
    decoded = round(size * 3 * float((source.heights.astype(float) * source.widths).mean()))
    return (
        (max(data.prefetch, 1) + 2) * images
        + (1 + len(prepared.config.teachers)) * logits
        + min(decoded, data.decoded_mib << 20)
    )


def engine_buffers(setup: EngineSetup, network: Network) -> Buffers:
    """What the engine gathers and reduces, by DeepSpeed 0.19.8's and PyTorch 2.15's sources."""
    whole = sum(parameter.numel() for parameter in network.parameters())
    match setup.engine.name:
        case "plain":
            return Buffers()
        case "fsdp2":
            return _fsdp2_buffers(setup, network)
        case "zero":
            assert setup.ds_config is not None
            return _zero_buffers(setup.ds_config["zero_optimization"], whole)


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
                # Of float32 shares stage 3 means to make no copy, but it compares a torch.device with a text (stage3.py
                # of 0.19.8, _create_fp32_partitions), and these are never equal: it does, on a GPU as on a CPU.
                copies_weights=stage >= 1,
                keeps_gradients=stage == 3,
                offloads_weights=_is_offloaded(zero, "offload_param"),
                offloads_optimizer=offloads_optimizer,
            )
        case "plain":
            return Sharding()


def _is_offloaded(zero: Mapping[str, Any], section: str) -> bool:
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
        host=host,
        checkpoint=whole * (4 if has_average else 3) + kept,  # weights, two moments, the average
    )


def _zero_buffers(zero: Mapping[str, Any], whole: int) -> Buffers:
    """whole: parameters of the network. Buckets are float32, whatever the precision."""
    if zero["stage"] == 0:
        return Buffers(update=FLOAT32_BYTES * min(whole, ZERO0_BUCKET))  # all gradients in a row
    # A key of stage 3 may stand in a file with its prefix or without.
    given = {key: zero.get(f"stage3_{key}", zero.get(key, default)) for key, default in ZERO_DEFAULTS.items()}
    double = 2 if zero.get("overlap_comm") and zero["stage"] < 3 else 1
    bucket = double * given["reduce_bucket_size"] if given["contiguous_gradients"] else 0
    # What is in the bucket is copied to be reduced: behind the backward pass, unless the bucket is full before.
    reduced = min(whole, given["reduce_bucket_size"])
    backward = bucket + (reduced if whole > given["reduce_bucket_size"] else 0)
    if zero["stage"] == 3:
        # What is gathered stays until its last use in the step, as far as that lies within stage3_max_reuse_distance
        # parameters, 1e9: of a network that is smaller all stays. What is prefetched comes in a row and is copied out.
        backward += min(whole, given["max_live_parameters"]) + min(whole, given["prefetch_bucket_size"])
    return Buffers(FLOAT32_BYTES * backward, FLOAT32_BYTES * (bucket + reduced))


def _fsdp2_buffers(setup: EngineSetup, network: Network) -> Buffers:
    """The root's weights stay gathered through a step. A block's are gathered while those of the one before are in use,
    and copied out; they come in autocast's precision, which then makes no copies of them.
    """
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(network)]
    root = sum(parameter.numel() for parameter in network.parameters()) - sum(blocks)
    dtype = AUTOCAST.get(setup.engine.precision)
    gathered = 3 * max(blocks, default=0) * (dtype or torch.float32).itemsize
    not_cast = 0 if dtype is None else sum(blocks) * dtype.itemsize  # counted in ``student_bytes``
    return Buffers(root * FLOAT32_BYTES + gathered - not_cast)


class _Step(nn.Module):
    """Forward pass, loss and backward pass of a student as one call, whose parameters ``functional_call`` replaces: a
    block that is computed again needs them in the backward pass, too."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, targets: Tensor, teacher_logits: tuple[Tensor, ...]) -> None:
        names = self.network.heads[1:]
        teachers = teacher_logits_type(names)(*teacher_logits)
        weights = dict.fromkeys(names, 1.0)
        loss = co_advise_loss(self.network(images), teachers, targets, temperature=1.0, weights=weights)
        loss.total.backward()


def student_bytes(
    network: Network, engine: EngineConfig, images_shape: tuple[int, ...], num_classes: int, *, has_gradients: bool
) -> int:
    """Bytes at the peak of a micro-step on fake tensors, without weights and batch. Changes ``network`` in place.

    Autocast's copies of the weights, the loss and its logits count. has_gradients: they are there before, and do not
    count; otherwise those that are there at the peak do.
    """
    network.train()
    network.precision = decided(engine.precision)
    if engine.activation_checkpointing:
        checkpoint_activations(network)
    step = _Step(network)
    with FakeTensorMode():
        state = fake_state(step)
        images, targets, *advice = (
            torch.empty(shape) for shape in (images_shape, *[(images_shape[0], num_classes)] * len(network.heads))
        )
        known = [*state.values(), images, targets, *advice]
        for parameter in state.values():
            if has_gradients and parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
        with _peak(known) as live:
            torch.func.functional_call(step, state, (images, targets, tuple(advice)))
    return live.peak


def passing_bytes(network: Network, images_shape: tuple[int, ...]) -> int:
    """Bytes at the peak of a forward pass without gradients, without the weights. Images of another size are resized to
    the network's own first, which counts, too, and so do autocast's copies of one layer's weights at a time.
    """
    network.eval().requires_grad_(False)
    with FakeTensorMode(), torch.no_grad():
        state, images = fake_state(network), torch.empty(images_shape)
        with _peak([*state.values(), images]) as live:
            torch.func.functional_call(network, state, (images,))
    return live.peak


@contextlib.contextmanager
def _peak(known: list[Tensor]) -> Iterator[LiveBytes]:
    live = LiveBytes(known)
    with contextlib.suppress(*UNTRIED), live:  # what follows from the values in the images is not counted
        yield live


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
            f"{size_text(plan.memory.checkpoint)} each",
        ),
        (f"memory per {device}", memory_text(plan.memory, device)),
    ]
    for name, teacher in config.teachers.items():
        if name in plan.teachers:
            run = plan.teachers[name]
            lines.append(
                (
                    f"teacher {name}",
                    f"{teacher.model} is trained first: {counted(run.total_steps, 'step')}, memory "
                    f"{memory_text(run.memory, device)}",
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
    precisions += ", TF32 where float32" * engine.tf32 + ", deterministically" * engine.deterministic
    compiled = ["student"] * bool(engine.compile) + ["teachers"] * (has_teachers and bool(distill.compile))
    has_graphs = bool(distill.compile) and prepared.world.device.type == "cuda"
    graphs = "in CUDA graphs" if has_graphs else "without CUDA graphs, which are of compiled teachers on a GPU"
    ds_config = prepared.engine_setup.ds_config
    sharding = engine.name if ds_config is None else f"ZeRO stage {ds_config['zero_optimization']['stage']}"
    return (
        f"computes on {device} in {precisions}, "
        f"{' and '.join(compiled) or 'nothing'} compiled{f', {graphs}' * (has_teachers and distill.cuda_graphs)}, "
        f"under {sharding}"
    )


def row(what: str, text: str) -> str:
    return f"{what:<16} {text}"


def memory_text(memory: Memory, device: str) -> str:
    """device: as ``plan_lines`` has it. A rank without a GPU has no workspace of one."""
    if device != "GPU":
        memory = dataclasses.replace(memory, workspace=0)
    listed = ", ".join(f"{part} {size_text(getattr(memory, part))}" for part in ON_DEVICE if getattr(memory, part))
    host = f", and {size_text(memory.host)} of the CPU's" if memory.host else ""
    assumed = " (assumed)" if memory.workspace else ""
    return f"{size_text(memory.device)}{host}, without fragmentation; {CERTAINTY}: {listed}{assumed}"


def size_text(count: int) -> str:
    """Bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def counted(number: int, what: str, several: str = "") -> str:
    """several: the plural, where it is more than an s."""
    return f"{number} {what if number == 1 else several or f'{what}s'}"
