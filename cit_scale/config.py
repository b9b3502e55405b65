"""The whole run as frozen dataclasses. The defaults are the paper's numbers (CiT, "Co-advise: Cross Inductive Bias
Distillation", CVPR 2022, and DeiT, which it follows); a recipe in ``recipes/`` adds teachers and states what differs.

Each fact has one home. What is known of a setting beside its type, default and meaning stands in its ``setting(...)``:
the rules for its value, whether it may change when a run goes on, whether the run that trains a teacher takes it from
the student's, whether ``cit-scale runs show`` lists it. ``settings`` says what follows from that. Whatever follows from
the numbers is a property or a function of them, never a second field.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cit_scale.errors import ConfigError
from cit_scale.settings import (
    ABOVE_0_TO_1,
    BETAS,
    FROM_0_TO_BELOW_1,
    NAMES,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_TEXT,
    POSITIVE_RANGE,
    SHARE,
    UP_TO_1024,
    UP_TO_65535,
    check_rules,
    section,
    sections_by_name,
    setting,
    walk,
)

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent if (PACKAGE.parent / "ds_configs" / "zero1.json").is_file() else PACKAGE / "checkout"
"""The checkout. Installed from a wheel: the folder in which the build has put what stands beside the package there."""

IS_CHECKOUT = REPOSITORY != PACKAGE / "checkout"
TRAIN_COMMAND = "deepspeed cit_scale/train.py" if IS_CHECKOUT else "deepspeed --module cit_scale.train"

DS_CONFIGS = REPOSITORY / "ds_configs"

NO_DATA = (
    "data.train is not set; say what to train on with --data.train DIR, or --data.train builtin:digits for a trial"
)


@dataclass(frozen=True)
class StudentConfig:
    """The network that this run trains."""

    name: str = setting(
        "cit_base_patch16_224", in_listing=True, drops=["kwargs", "weights", "pretrained", "image_size"]
    )
    """Any timm model, or one that a description names: hf-hub:OWNER/NAME, local-dir:FOLDER. A CiT has a token for each
    teacher, another model a head."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""

    weights: str | None = setting(None, may_change=True)
    """Start from these weights, as far as they fit: a file, a folder in the hub's layout, or a run folder. They come
    before `pretrained`."""

    pretrained: bool | str = setting(False, may_change=True)
    """Start from these weights, as far as they fit: a timm model with its tag, hf-hub:OWNER/NAME or local-dir:FOLDER;
    true: those of `name`."""

    image_size: int | Literal["own"] | None = setting(None, rules=[POSITIVE_OR_TEXT])
    """Height and width that this network sees, resized on the device; null: data.image_size; own: what the pretrained
    weights were made for."""

    @property
    def start(self) -> str | None:
        """Name of the weights from which the training starts."""
        return self.weights or _named(self.pretrained, self.name)


@dataclass(frozen=True)
class TeacherConfig:
    """One frozen network that advises the student through a token of its own."""

    model: str = setting(MISSING, drops=["kwargs", "weights", "pretrained", "image_size", "classes", "recipe"])
    """Any timm model."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""

    weights: str | None = setting(None, may_change=True)
    """Weights of a teacher of the data's classes: a file, a folder in the hub's layout, or a run folder. Without them
    the teacher is trained first, with `recipe`."""

    pretrained: bool | str = setting(False, may_change=True)
    """As student.pretrained: where the training with `recipe` starts. Without a recipe, or with `classes`, the teacher
    advises as it is."""

    image_size: int | Literal["own"] | None = setting("own", rules=[POSITIVE_OR_TEXT])
    """As student.image_size."""

    classes: str | None = None
    """For pretrained weights that know more classes: names maps the data's to theirs by name; or a file with theirs."""

    recipe: str | None = None
    """The recipe that trains this teacher on the student's data when `weights` is not given: a name or a path."""

    weight: float = setting(1.0, rules=[NOT_NEGATIVE])
    """Weight of this teacher's divergence in the loss."""

    @property
    def start(self) -> str | None:
        """Name of the pretrained weights."""
        return _named(self.pretrained, self.model)

    @property
    def advises_with(self) -> str | None:
        """Name of the weights with which the teacher advises; None if it is trained first."""
        return self.weights or (self.start if self.classes or self.recipe is None else None)


def _named(pretrained: bool | str, model: str) -> str | None:
    return (model if pretrained else None) if isinstance(pretrained, bool) else pretrained


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    train: str | None = setting(None, may_change=True, in_listing=True)
    """Has to be given: a folder with one sub-folder of images per class, a folder of tar shards, a .csv or .tsv table
    of paths and labels, an idx file of images, or 'builtin:digits' (scikit-learn's handwritten digits)."""

    eval: str | None = setting(None, may_change=True)
    """Like `train`, with the same classes. Without it a part of `train` is held out."""

    balance: Literal["none", "sqrt", "full"] = "none"
    """How often a class stands in an epoch: in proportion to its images, to their square root, or as any other."""

    holdout: float = setting(0.2, rules=[SHARE])
    """The part of `train` that is held out for evaluation when `eval` is not given."""

    label_key: str | None = None
    """Of tar shards with a .json beside each image: the key of its label. Without it .cls files have the labels."""

    split_names: bool = setting(False, may_change=True)
    """Whether classes may be called train, val, valid or test. As a rule these are a data set's parts."""

    image_size: int = setting(224, rules=[POSITIVE, UP_TO_65535], in_listing=True)
    """Height and width of what the networks see, in pixels."""

    crop_ratio: float = setting(0.875, rules=[ABOVE_0_TO_1])
    """In evaluation the shorter side is resized to image_size / crop_ratio before the centre crop."""

    cache_dir: str = setting("~/.cache/cit_scale", may_change=True)
    """Where built-in data sets and the indices of others are kept."""

    verify: bool = setting(False, may_change=True)
    """Hash all images at the start, and refuse to go on with a run whose images have other bytes by then."""

    decode_threads: int | None = setting(None, rules=[POSITIVE, UP_TO_1024], may_change=True)
    """Threads of each rank that read files, as many that decode and, without a GPU, as many that resize. null: 4; on a
    GPU the rank's share of the node's cores, from 4 to 12."""

    prefetch: int = setting(2, rules=[NOT_NEGATIVE, UP_TO_1024], may_change=True)
    """Micro-batches that are read ahead, and as many that are decoded ahead; 0 prepares each when it is asked for."""

    decoded_mib: int = setting(2048, rules=[POSITIVE], may_change=True)
    """MiB of decoded images that a stream holds at once, before they are resized; a larger image is decoded alone."""

    max_pixels: int = setting(178_956_970, rules=[POSITIVE], may_change=True)
    """An image of more pixels, by its header, is not decoded: it counts as one that cannot be used."""

    hw_decoder_load: float = setting(0.0, rules=[SHARE], may_change=True)
    """On a GPU: the share of JPEGs that its hardware decoder takes, where it has one; its cores decode the others. None
    by default: the hardware decoder of nvJPEG 12.3.5 to 13.2.1 is reported to write pixels before its stream's turn on
    an H100, and none was tried here."""

    pinned_memory_mib: int = setting(0, rules=[NOT_NEGATIVE], may_change=True)
    """On a GPU: page-locked host memory, MiB, that each rank takes at its start rather than piece by piece."""

    max_bad_images: int = setting(50, rules=[NOT_NEGATIVE], may_change=True)
    """Images that cannot be used are reported and replaced, up to so many; past it the run stops with their list."""


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to one training image, in this order."""

    crop_scale: tuple[float, float] = setting((0.08, 1.0), rules=[POSITIVE_RANGE])
    """Random resized crop: share of the image's area."""

    crop_ratio: tuple[float, float] = setting((3 / 4, 4 / 3), rules=[POSITIVE_RANGE])
    """Random resized crop: width / height."""

    flip_prob: float = setting(0.5, rules=[SHARE])
    """Probability of a horizontal flip."""

    policy: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation, or '3a' (DeiT III: grey, solarized or blurred; colour jitter); null for none."""

    erase_prob: float = setting(0.25, rules=[SHARE])
    """Probability of random erasing with per-pixel noise."""

    repeats: int = setting(1, rules=[POSITIVE])
    """Repeated augmentation: how often a sample stands in the order of an epoch, each time augmented anew."""


@dataclass(frozen=True)
class MixingConfig:
    """Mixup and cutmix over groups of neighbours in the global batch."""

    mixup_alpha: float = setting(0.8, rules=[NOT_NEGATIVE])
    """Beta parameter of mixup; 0 turns it off."""

    cutmix_alpha: float = setting(1.0, rules=[NOT_NEGATIVE])
    """Beta parameter of cutmix; 0 turns it off."""

    prob: float = setting(1.0, rules=[SHARE])
    """Probability that a group is mixed at all."""

    switch_prob: float = setting(0.5, rules=[SHARE])
    """Probability of cutmix where both are on."""

    smoothing: float = setting(0.1, rules=[SHARE])
    """Label smoothing."""

    group_size: int | None = setting(8, rules=[POSITIVE])
    """Images that share one lambda and mix among themselves. Micro-batches hold whole groups: all layouts mix alike.
    null: a rank's micro-batch is one group, as in timm's Mixup; another number of ranks then mixes otherwise."""


@dataclass(frozen=True)
class DistillConfig:
    """How the teachers advise."""

    temperature: float = setting(1.0, rules=[POSITIVE])
    """T of the divergence, which is multiplied by its square."""

    teacher_precision: Literal["auto", "float32", "bf16"] = "float32"
    """bf16 runs the frozen teachers under autocast; auto: on a GPU that has it."""

    compile: bool | Literal["auto"] = "auto"
    """Compile the teachers with torch.compile; auto: on a GPU, and on a CPU where the whole run gains more than that
    takes. As any auto, it is decided at a run's first start and then kept."""

    cuda_graphs: bool = setting(False, may_change=True)
    """On a GPU: replay each compiled teacher as one CUDA graph, which takes the host one launch. Needs `compile`."""

    class_weights: Literal["none", "sqrt", "full"] = setting("none", for_teachers=True)
    """Weight of a class in the label loss, the other way to data.balance: all alike, or in inverse proportion to the
    square root of its number of images, or to the number."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = setting(1e-3, rules=[POSITIVE], in_listing=True)
    """Peak learning rate at a global batch of `lr_batch_size`; scaled linearly with the global batch."""

    lr_batch_size: int = setting(1024, rules=[POSITIVE])
    """The global batch for which `lr` is stated."""

    warmup_lr: float = setting(1e-6, rules=[NOT_NEGATIVE])
    """Learning rate at step 0."""

    min_lr: float = setting(1e-5, rules=[NOT_NEGATIVE])
    """Learning rate at the end of the cosine."""

    warmup_epochs: float = setting(20, rules=[NOT_NEGATIVE])
    """Length of the linear warm-up."""

    betas: tuple[float, float] = setting((0.9, 0.999), rules=[BETAS])
    """AdamW's running-average coefficients."""

    eps: float = setting(1e-8, rules=[POSITIVE])
    """AdamW's epsilon."""

    weight_decay: float = setting(0.05, rules=[NOT_NEGATIVE])
    """On matrices and convolutions only: not on one-dimensional parameters, biases, tokens, the position embedding."""

    clip_norm: float = setting(15.0, rules=[NOT_NEGATIVE])
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""

    ema_decay: float | None = setting(None, rules=[FROM_0_TO_BELOW_1])
    """Keep an exponential moving average of the weights with this decay."""

    ema_warmup: bool = False
    """Let the average follow faster at first: with a decay of at most (1 + n) / (10 + n) at update n."""

    layer_decay: float = setting(1.0, rules=[ABOVE_0_TO_1])
    """Each layer learns at so much of the rate of the layer above it; the heads at the whole."""

    head_lr_scale: float = setting(1.0, rules=[POSITIVE])
    """The heads learn at so many times the rate of the last layer."""


@dataclass(frozen=True)
class EngineConfig:
    """What hosts the student."""

    name: Literal["zero", "fsdp2", "plain"] = setting("zero", may_change=True, in_listing=True)
    """zero: DeepSpeed ZeRO. fsdp2: PyTorch's fully_shard. Both on any number of ranks. plain: one process alone."""

    ds_config: str = setting("zero1", may_change=True, in_listing=True)
    """How ZeRO shards: a file in ds_configs/ by name, or a path."""

    precision: Literal["auto", "float32", "bf16", "fp16"] = setting("float32", in_listing=True)
    """bf16 and fp16 are autocast over float32 weights; fp16, for cards without bf16, scales the loss. auto: bf16 on a
    GPU that has it, otherwise float32."""

    tf32: bool = False
    """On a GPU: let float32 matrix products and convolutions round their inputs to TF32, which has 10 bits of fraction
    instead of 23. Faster; without it float32 is float32."""

    deterministic: bool = setting(False, may_change=True)
    """The same bits from the same inputs, on a GPU too, with algorithms that may be slower; an operator that has none
    such ends the run. A CPU's are the same without it."""

    batch_norm: Literal["local", "synchronized"] = "local"
    """Whose images BatchNorm in the student's stems normalises with: each rank's own, or those of all ranks."""

    activation_checkpointing: bool = setting(False, may_change=True, for_teachers=False)
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""

    compile: bool | Literal["auto"] = "auto"
    """Compile the student with torch.compile; auto: on a GPU, but not at ZeRO stage 3. Not on a CPU."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, how often to save, when to give up."""

    epochs: int = setting(300, rules=[POSITIVE], in_listing=True)
    """Passes over the training set."""

    freeze: tuple[str, ...] = setting((), rules=[NAMES])
    """Parts of the network that are not trained: names of modules or parameters, with * and ?; trunk: all but heads;
    batch_norm: BatchNorms, statistics included."""

    global_batch_size: int = setting(1024, rules=[POSITIVE], in_listing=True)
    """Images per update, over all ranks and micro-steps."""

    micro_batch_size: int | None = setting(None, rules=[POSITIVE], may_change=True, for_teachers=True)
    """Images per rank per forward, at most; the micro-steps follow. Without it each rank takes its share at once."""

    log_every_steps: int = setting(50, rules=[POSITIVE], may_change=True)
    """How often metrics are read from the device and written."""

    eval_every_epochs: int = setting(10, rules=[POSITIVE], may_change=True)
    """How often the student is evaluated; it always is at the end."""

    save_every_steps: int = setting(500, rules=[POSITIVE], may_change=True)
    """How often a checkpoint is written; one also is at the end and when the run is asked to stop."""

    save_every_minutes: float = setting(15, rules=[NOT_NEGATIVE], may_change=True, for_teachers=True)
    """A checkpoint is also written when the last one is older; 0 leaves it to the steps."""

    keep_last: int = setting(2, rules=[POSITIVE], may_change=True)
    """How many of the newest checkpoints are kept."""

    keep_every_steps: int | None = setting(None, rules=[POSITIVE], may_change=True)
    """Checkpoints of multiples of this are kept for good; they are written whatever save_every_steps says."""

    keep_best: int = setting(1, rules=[NOT_NEGATIVE], may_change=True)
    """How many of those with the best average top-1 are kept, and as many of the moving average's best; above 0, a
    checkpoint follows every evaluation, and the finished run has the best weights by name."""

    max_bad_steps: int = setting(10, rules=[POSITIVE], may_change=True, for_teachers=True)
    """After so many steps in a row that are not finite the run stops, with their batches beside the checkpoints."""

    forecast: bool = setting(False, may_change=True)
    """Say beforehand how long the run will take, from some trial steps of each network."""

    report: bool = setting(True, may_change=True)
    """Leave a page about the finished run, report.html; it takes about as long as evaluating the student once more, and
    its teachers."""

    start_timeout_s: float = setting(300, rules=[POSITIVE], may_change=True)
    """How long the ranks wait for one another at the start; then the nodes that did not arrive are named."""

    step_timeout_s: float = setting(1800, rules=[NOT_NEGATIVE], may_change=True, for_teachers=True)
    """A step, evaluation batch or checkpoint that takes longer hangs: all ranks leave, with their stacks. After the
    first steps half of it, but no less than 15 minutes, is enough for a step, if 20 times the slowest is. 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    name: str = setting("run", may_change=True)
    """The run folder is runs_dir/name."""

    runs_dir: str = setting("runs", may_change=True, for_teachers=True)
    """Where run folders stand."""

    seed: int = setting(0, rules=[NOT_NEGATIVE], for_teachers=True, in_listing=True)
    """All randomness of the run follows from it."""

    student: StudentConfig = section(StudentConfig)
    teachers: dict[str, TeacherConfig] = sections_by_name(TeacherConfig)
    """Teachers by the name of their token and head. Empty: plain supervised training."""

    data: DataConfig = section(DataConfig, for_teachers=True)
    augment: AugmentConfig = section(AugmentConfig, for_teachers=True)
    mixing: MixingConfig = section(MixingConfig)
    distill: DistillConfig = section(DistillConfig)
    optim: OptimConfig = section(OptimConfig)
    engine: EngineConfig = section(EngineConfig, for_teachers=True)
    train: TrainConfig = section(TrainConfig)

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
        groups = "the same number of images" if group == 1 else f"whole mixing groups of mixing.group_size={group}"
        raise ConfigError(
            f"train.global_batch_size={total} does not give each of {world_size} ranks {groups}; the nearest that do: "
            f"{', '.join(near)}"
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
    check_rules(config)
    if config.optim.warmup_epochs > config.train.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} is longer than train.epochs={config.train.epochs}; "
            f"set optim.warmup_epochs to {config.train.epochs} or less"
        )
    for name, teacher in config.teachers.items():
        if teacher.classes and teacher.advises_with is None:
            raise ConfigError(
                f"teachers.{name}.classes={teacher.classes} maps the classes of weights that know more, and there are "
                f"none; give teachers.{name}.pretrained, or .weights"
            )
    optim, batch = config.optim, config.train.global_batch_size
    lowest = {"min_lr": optim.min_lr} | ({"warmup_lr": optim.warmup_lr} if optim.warmup_epochs else {})
    for name, lr in lowest.items():
        if config.peak_lr < lr:
            raise ConfigError(
                f"the peak of the learning rate would be its lowest value: it is optim.lr={optim.lr:g} * "
                f"train.global_batch_size={batch} / optim.lr_batch_size={optim.lr_batch_size} = {config.peak_lr:g}, "
                f"below optim.{name}={lr:g}; raise optim.lr or lower optim.{name}"
            )
    if config.engine.deterministic and config.data.hw_decoder_load:
        raise ConfigError(
            f"engine.deterministic=true, but with data.hw_decoder_load={config.data.hw_decoder_load:g} a GPU's hardware"
            " decodes some images and its cores the others, whose pixels may differ; set data.hw_decoder_load=0"
        )
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
    """Raise ConfigError for a name that leads out of the folder of runs or cannot be printed, for a text that was left
    empty, and for a home folder that is not there.

    A shell makes an empty text of a variable that is not set: with --fresh, an empty name would set aside all runs.
    """
    names = {f"name={config.name!r}": config.name, **{f"teachers: {name!r}": name for name in config.teachers}}
    for shown, name in names.items():
        # As typed: pathlib would drop a ".".
        leads_out = not name or name.startswith("/") or {".", ".."} & set(name.split("/"))
        if leads_out or not name.isprintable():  # a batch script has it in a line, and TensorBoard in UTF-8
            raise ConfigError(
                f"{shown} does not name a folder inside another: it must not be empty or begin with /, nor have . "
                "or .. between its slashes, nor characters that cannot be printed; give one such as 'pets' or "
                "'pets/large'"
            )
    for each in walk(config):
        if each.value == "":
            raise ConfigError(f"{each.name} is an empty text; leave it out, or give null where it may be none")
        if isinstance(each.value, str) and each.value.startswith("~"):
            expand(each.value)
