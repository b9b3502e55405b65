"""The whole run as frozen dataclasses. The defaults are the paper's recipe (CiT, "Co-advise: Cross Inductive Bias
Distillation", CVPR 2022, and DeiT, which it follows); a recipe file in ``recipes/`` states only what differs.

Each number has one home. Whatever follows from the numbers is a property or a function of them, never a second field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from cit_scale.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
DS_CONFIGS = REPOSITORY / "ds_configs"


@dataclass(frozen=True)
class StudentConfig:
    """The network that this run trains."""

    name: str = "cit_base_patch16_224"
    """Any timm model; the ones registered by cit_scale.models can be advised."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""

    weights: str | None = None
    """Start from these weights: a safetensors or PyTorch state dict, ours or the authors' released one."""


@dataclass(frozen=True)
class TeacherConfig:
    """One frozen network that advises the student through a token of its own."""

    model: str
    """Any timm model."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""

    weights: str | None = None
    """A safetensors or PyTorch state dict. Without it the teacher is trained first, with `recipe`."""

    recipe: str | None = None
    """The recipe that trains this teacher on the student's data when `weights` is not given: a name or a path."""

    weight: float = 1.0
    """Weight of this teacher's divergence in the loss."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    train: str = "digits"
    """A folder with one sub-folder of images per class, a folder of tar shards, a .csv or .tsv table of paths and
    labels, an idx file of images, or 'digits' (scikit-learn's handwritten digits)."""

    eval: str | None = None
    """Like `train`, with the same classes. Without it a part of `train` is held out."""

    holdout: float = 0.2
    """The part of `train` that is held out for evaluation when `eval` is not given."""

    image_size: int = 224
    """Height and width of what the networks see, in pixels."""

    crop_ratio: float = 0.875
    """In evaluation the shorter side is resized to image_size / crop_ratio before the centre crop."""

    cache_dir: str = "~/.cache/cit_scale"
    """Where built-in data sets and the indices of others are kept."""

    decode_threads: int = 4
    """Threads of the decoding pipeline, for each rank."""

    prefetch: int = 2
    """Micro-batches that are read ahead, and as many that are decoded ahead; 0 prepares each when it is asked for."""

    hw_decoder_load: float = 0.65
    """On a GPU: the share of JPEGs that its hardware decoder takes, where it has one; its cores decode the others."""

    pinned_memory_mib: int = 0
    """On a GPU: page-locked host memory, MiB, that each rank takes at its start rather than piece by piece."""

    max_bad_images: int = 50
    """Images that cannot be used are reported and replaced, up to so many; past it the run stops with their list."""


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to one training image, in this order."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: share of the image's area."""

    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: width / height."""

    flip_prob: float = 0.5
    """Probability of a horizontal flip."""

    policy: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation, or '3a' (DeiT III: grey, solarized or blurred; colour jitter); null for none."""

    erase_prob: float = 0.25
    """Probability of random erasing with per-pixel noise."""

    repeats: int = 1
    """Repeated augmentation: how often a sample stands in the order of an epoch, each time augmented anew."""


@dataclass(frozen=True)
class MixingConfig:
    """Mixup and cutmix over groups of neighbours in the global batch."""

    mixup_alpha: float = 0.8
    """Beta parameter of mixup; 0 turns it off."""

    cutmix_alpha: float = 1.0
    """Beta parameter of cutmix; 0 turns it off."""

    prob: float = 1.0
    """Probability that a group is mixed at all."""

    switch_prob: float = 0.5
    """Probability of cutmix where both are on."""

    smoothing: float = 0.1
    """Label smoothing."""

    group_size: int | None = 8
    """Images that share one lambda and mix among themselves. Micro-batches hold whole groups: all layouts mix alike.
    null: a rank's micro-batch is one group, as in timm's Mixup; another number of ranks then mixes otherwise."""


@dataclass(frozen=True)
class DistillConfig:
    """How the teachers advise."""

    temperature: float = 1.0
    """T of the divergence, which is multiplied by its square."""

    teacher_precision: Literal["float32", "bf16"] = "float32"
    """bf16 runs the frozen teachers under autocast."""

    compile: bool = True
    """Compile the teachers with torch.compile."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-3
    """Peak learning rate at a global batch of `lr_batch_size`; scaled linearly with the global batch."""

    lr_batch_size: int = 1024
    """The global batch for which `lr` is stated."""

    warmup_lr: float = 1e-6
    """Learning rate at step 0."""

    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""

    warmup_epochs: float = 20
    """Length of the linear warm-up."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running-average coefficients."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.05
    """On matrices and convolutions only: not on one-dimensional parameters, biases, tokens, the position embedding."""

    clip_norm: float = 15.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""

    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay."""


@dataclass(frozen=True)
class EngineConfig:
    """What hosts the student."""

    name: Literal["zero", "fsdp2", "plain"] = "zero"
    """zero: DeepSpeed ZeRO. fsdp2: PyTorch's fully_shard. Both on any number of ranks. plain: one process alone."""

    ds_config: str = "zero1"
    """How ZeRO shards: a file in ds_configs/ by name, or a path."""

    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16 and fp16 are autocast over float32 weights; fp16, for cards without bf16, scales the loss."""

    batch_norm: Literal["local", "synchronized"] = "local"
    """Whose images BatchNorm in the student's stems normalises with: each rank's own, or those of all ranks."""

    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""

    compile: bool = False
    """Compile the student with torch.compile."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, how often to save, when to give up."""

    epochs: int = 300
    """Passes over the training set."""

    global_batch_size: int = 1024
    """Images per update, over all ranks and micro-steps."""

    micro_batch_size: int | None = None
    """Images per rank per forward, at most; the micro-steps follow. Without it each rank takes its share at once."""

    log_every_steps: int = 50
    """How often metrics are read from the device and written."""

    eval_every_epochs: int = 10
    """How often the student is evaluated; it always is at the end."""

    save_every_steps: int = 500
    """How often a checkpoint is written; one also is at the end and when the run is asked to stop."""

    save_every_minutes: float = 15
    """A checkpoint is also written when the last one is older; 0 leaves it to the steps."""

    keep_last: int = 2
    """How many of the newest checkpoints are kept."""

    keep_every_steps: int | None = None
    """Checkpoints of multiples of this are kept for good; they are written whatever save_every_steps says."""

    keep_best: int = 0
    """How many of those with the best average top-1 are kept; above 0, a checkpoint follows every evaluation."""

    max_bad_steps: int = 10
    """After so many steps in a row that are not finite the run stops, with their batches beside the checkpoints."""

    start_timeout_s: float = 300
    """How long the ranks wait for one another at the start; then the nodes that did not arrive are named."""

    step_timeout_s: float = 1800
    """A step, evaluation batch or checkpoint that takes longer hangs: all ranks leave, with their stacks. 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    name: str = "run"
    """The run folder is runs_dir/name."""

    runs_dir: str = "runs"
    """Where run folders stand."""

    seed: int = 0
    """All randomness of the run follows from it."""

    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers by the name of their token and head. Empty: plain supervised training."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).expanduser() / self.name

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up at this run's global batch."""
        return self.optim.lr * self.train.global_batch_size / self.optim.lr_batch_size


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is cut: images per rank per forward, and forwards per update."""

    micro_batch_size: int
    micro_steps: int


def split_batch(config: RunConfig, world_size: int) -> BatchSplit:
    """Derive the micro-steps: the largest micro-batches up to micro_batch_size that cut a rank's share evenly.

    Raises ConfigError where there are none, with a global batch that has some.
    """
    total, group = config.train.global_batch_size, config.mixing.group_size or 1
    if total % (world_size * group):
        part = world_size * group
        near = [str(each) for each in (total // part * part, -(-total // part) * part) if each]
        raise ConfigError(
            f"train.global_batch_size={total} does not give each of {world_size} ranks whole mixing groups of "
            f"mixing.group_size={group}; the nearest that do: {', '.join(near)}"
        )
    share = total // world_size
    most = min(config.train.micro_batch_size or share, share)
    if most < group:
        raise ConfigError(
            f"train.micro_batch_size={most} is less than one mixing group of mixing.group_size={group}; "
            f"set it to {group} or more, or the group size lower"
        )
    micro = next(size for size in range(most - most % group, 0, -group) if share % size == 0)
    return BatchSplit(micro_batch_size=micro, micro_steps=share // micro)


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for the first setting that no run can have, whatever its data and its networks."""
    check_names(config)
    check_ranges(config)
    if config.engine.name == "zero":
        find_ds_config(config.engine.ds_config)


def find_ds_config(name: str) -> Path:
    """The file that says how ZeRO shards, by its name in ds_configs/ or by its path. Raises ConfigError."""
    named = DS_CONFIGS / f"{name}.json"
    path = named if named.is_file() else expand(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"engine.ds_config={name} is neither a file nor one of {known}")
    return path


def expand(path: str) -> Path:
    """With ~ and ~user replaced by a home folder. Raises ConfigError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}; write the folder out") from error


def check_names(config: RunConfig) -> None:
    """Raise ConfigError for a name that leads out of the folder of runs, or a text that was left empty.

    A shell makes an empty text of a variable that is not set: with --fresh, an empty name would set aside all runs.
    """
    names = {f"name={config.name!r}": config.name, **{f"teachers: {name!r}": name for name in config.teachers}}
    for setting, name in names.items():
        # As typed: pathlib would drop a ".".
        leads_out = not name or name.startswith("/") or {".", ".."} & set(name.split("/"))
        if leads_out or not name.isprintable():  # a batch script has it in a line, and TensorBoard in UTF-8
            raise ConfigError(
                f"{setting} does not name a folder inside another: it must not be empty or begin with /, nor have . "
                "or .. between its slashes, nor characters that cannot be printed; give one such as 'pets' or "
                "'pets/large'"
            )
    for setting, text in _texts(config):
        if not text:
            raise ConfigError(f"{setting} is an empty text; leave it out, or give null where it may be none")
        if text.startswith("~"):
            expand(text)


def _texts(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting that is a text, by its dotted name. Arguments of timm.create_model may be empty."""
    for each in fields(section):
        value = getattr(section, each.name)
        if isinstance(value, str):
            yield f"{prefix}{each.name}", value
        elif is_dataclass(value):
            yield from _texts(value, f"{prefix}{each.name}.")
        elif each.name == "teachers":
            for name, teacher in value.items():
                yield from _texts(teacher, f"{prefix}teachers.{name}.")


def check_ranges(config: RunConfig) -> None:
    """Raise ConfigError for the first number outside its range."""
    data, augment, mixing, optim, train = config.data, config.augment, config.mixing, config.optim, config.train
    positive = {
        "data.image_size": data.image_size,
        "data.decode_threads": data.decode_threads,
        "augment.repeats": augment.repeats,
        "mixing.group_size": mixing.group_size if mixing.group_size is not None else 1,
        "distill.temperature": config.distill.temperature,
        "optim.lr": optim.lr,
        "optim.lr_batch_size": optim.lr_batch_size,
        "optim.eps": optim.eps,
        "train.epochs": train.epochs,
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size if train.micro_batch_size is not None else 1,
        "train.log_every_steps": train.log_every_steps,
        "train.save_every_steps": train.save_every_steps,
        "train.keep_last": train.keep_last,
        "train.keep_every_steps": train.keep_every_steps if train.keep_every_steps is not None else 1,
        "train.max_bad_steps": train.max_bad_steps,
        "train.eval_every_epochs": train.eval_every_epochs,
        "train.start_timeout_s": train.start_timeout_s,
    }
    not_negative = {
        "seed": config.seed,
        "data.prefetch": data.prefetch,
        "data.pinned_memory_mib": data.pinned_memory_mib,
        "data.max_bad_images": data.max_bad_images,
        "mixing.mixup_alpha": mixing.mixup_alpha,
        "mixing.cutmix_alpha": mixing.cutmix_alpha,
        "optim.warmup_lr": optim.warmup_lr,
        "optim.min_lr": optim.min_lr,
        "optim.warmup_epochs": optim.warmup_epochs,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_norm": optim.clip_norm,
        "train.save_every_minutes": train.save_every_minutes,
        "train.keep_best": train.keep_best,
        "train.step_timeout_s": train.step_timeout_s,
        **{f"teachers.{name}.weight": teacher.weight for name, teacher in config.teachers.items()},
    }
    shares = {
        "augment.flip_prob": augment.flip_prob,
        "augment.erase_prob": augment.erase_prob,
        "mixing.prob": mixing.prob,
        "mixing.switch_prob": mixing.switch_prob,
        "mixing.smoothing": mixing.smoothing,
        "optim.ema_decay": optim.ema_decay if optim.ema_decay is not None else 0,
        "data.holdout": data.holdout,
        "data.hw_decoder_load": data.hw_decoder_load,
    }
    # Written as "not inside", so that NaN is outside.
    rules = (
        (positive, lambda value: value > 0, "must be above 0"),
        (not_negative, lambda value: value >= 0, "must not be negative"),
        (shares, lambda value: 0 <= value <= 1, "must be between 0 and 1"),
    )
    for settings, is_inside, rule in rules:
        for name, value in settings.items():
            if not is_inside(value):
                raise ConfigError(f"{name}={value} {rule}")
    for name, (low, high) in {
        "augment.crop_scale": augment.crop_scale,
        "augment.crop_ratio": augment.crop_ratio,
    }.items():
        if not 0 < low <= high:
            raise ConfigError(f"{name}=[{low}, {high}] must be two numbers above 0, the smaller first")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas={list(optim.betas)} must be two numbers from 0 to below 1")
    if config.seed >= 2**63:
        raise ConfigError(f"seed={config.seed} must be below 2^63")
    if not 0 < data.crop_ratio <= 1:
        raise ConfigError(f"data.crop_ratio={data.crop_ratio} must be above 0 and at most 1")
    if optim.warmup_epochs > train.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={optim.warmup_epochs} is longer than train.epochs={train.epochs}; shorten it"
        )
