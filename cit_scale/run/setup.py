"""Prepare a run: check its configuration, open its data, try its networks, before anything is trained."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sysconfig
import zipfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml

from cit_scale.batch import Batch
from cit_scale.config import BatchSplit, DataConfig, RunConfig, TeacherConfig, check_config
from cit_scale.data.draws import read_policy
from cit_scale.data.order import (
    EXPONENTS,
    Cursor,
    class_quotas,
    epoch_order,
    repeat_spread,
    share_together,
    steps_per_epoch,
)
from cit_scale.data.reader import Reader
from cit_scale.data.stream import eval_stream, train_stream
from cit_scale.data.versions import LATEST, StreamVersions
from cit_scale.datasets.contents import image_hashes
from cit_scale.datasets.index import cache_folder, shorten
from cit_scale.datasets.pixels import BY_VERSION
from cit_scale.datasets.sources import Source, open_sources
from cit_scale.distributed.world import World, broadcast, first_on_each_node, run_on_all_ranks
from cit_scale.engines.base import EngineSetup, prepare_network
from cit_scale.engines.build import prepare_engine
from cit_scale.errors import BadDataError, CannotWriteError, ConfigError, RefusedError, one_line, os_error
from cit_scale.files import rename_aside
from cit_scale.losses import balancing_weights
from cit_scale.models.freeze import freeze
from cit_scale.models.involution import Involution2d
from cit_scale.models.network import Network, build_network, described_model, try_forward
from cit_scale.models.pretrained import FOLDER, HUB, Pretrained, description_of, find_pretrained, read_description
from cit_scale.models.weights import Start, load_weights, start_from
from cit_scale.optim import parameter_groups
from cit_scale.recipe import Given
from cit_scale.run.folders import runs_inside
from cit_scale.run.noted import noted_versions
from cit_scale.run_folder import CHECKPOINTS, CONFIG, DESCRIPTION, NETWORKS, RESULTS, saved_steps
from cit_scale.settings import changed_settings
from cit_scale.teachers import Teacher, build_teacher_without_weights, load_teacher

MOST_CHANGED = 5  # settings that a message lists

STUDENT = ""
"""The student's key among the teachers' names."""


@dataclass(frozen=True)
class PreparedRun:
    """A checked run on this machine, with its data opened and its engine's setup derived from the configuration.

    teacher_runs: by teacher, the prepared run of each teacher that has no weights. It reads the same images.
    has_begun: when this process came, the run folder had a checkpoint or results of it. versions: of its batches.
    given: what the user gave of the configuration; None where that is not known.
    """

    config: RunConfig
    engine_setup: EngineSetup
    train_images: Reader
    eval_images: Reader
    teacher_runs: Mapping[str, PreparedRun]
    has_begun: bool = False
    versions: StreamVersions = LATEST
    given: Given | None = None

    @property
    def world(self) -> World:
        return self.engine_setup.world

    @property
    def batch_split(self) -> BatchSplit:
        return self.engine_setup.batch_split

    @property
    def train_set(self) -> Source:
        return self.train_images.source

    @property
    def eval_set(self) -> Source:
        return self.eval_images.source

    @property
    def num_classes(self) -> int:
        return len(self.train_set.classes)

    @functools.cached_property
    def images_by_class(self) -> dict[str, int]:
        counts = np.bincount(self.train_set.labels, minlength=self.num_classes)
        return dict(zip(self.train_set.classes, counts.tolist(), strict=True))

    @property
    def places_by_class(self) -> dict[str, int]:
        """How often an image of the class stands in an epoch, by data.balance."""
        counts = np.array(list(self.images_by_class.values()))
        repeats = self.config.augment.repeats
        places = self.steps_per_epoch * self.config.train.global_batch_size // repeats
        quotas = repeats * class_quotas(counts, self.config.data.balance, places)
        return dict(zip(self.images_by_class, quotas.tolist(), strict=True))

    @functools.cached_property
    def class_weights(self) -> torch.Tensor | None:
        """Weights of the classes in the label loss, (K,) on the device; None: all 1."""
        exponent = 1 - EXPONENTS[self.config.distill.class_weights]
        if exponent == 0:
            return None
        counts = torch.tensor(list(self.images_by_class.values()))
        return balancing_weights(counts, exponent).to(self.world.device)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train_set), self.config.train.global_batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    def train_batches(self, step: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches from ``step`` on, without end."""
        config, world = self.config, self.world
        return train_stream(
            self.train_images,
            config.augment,
            config.data,
            seed=config.seed,
            cursor=Cursor.at_step(step, len(self.train_set), config.train.global_batch_size),
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=self.batch_split.micro_batch_size,
            world=world,
            device=world.device,
            spread=self.repeat_spread,
            draws_version=self.versions.draws,
        )

    @property
    def repeat_spread(self) -> int:
        """Places between two repeats of a sample."""
        return repeat_spread(self.versions.order, self.config.mixing.group_size)

    @property
    def repeats_together(self) -> float:
        """Share of the repeats in the first epoch that are in one update with another of the same sample."""
        if self.config.augment.repeats == 1:
            return 0.0
        config, batch = self.config, self.config.train.global_batch_size
        spread, places = self.repeat_spread, self.steps_per_epoch * batch
        order = epoch_order(places, config.seed, 0, config.augment.repeats, spread)  # as far apart as balanced ones
        return share_together(order[0], batch)

    def eval_batches(self) -> Generator[Batch, None, None]:
        """This rank's share of the evaluation set, once, in batches of the training's micro-batch size."""
        size = self.batch_split.micro_batch_size
        return eval_stream(
            self.eval_images, self.config.data, batch_size=size, world=self.world, device=self.world.device
        )

    @functools.cached_property
    def source(self) -> Pretrained | None:
        """Description of the weights from which the student starts; None if there are none.

        A run that has begun goes by its own config.json: it goes on as it was, whatever became of its source.
        """
        config, start = self.config.run_dir / DESCRIPTION, self.config.student.start
        if self.has_begun and config.is_file():
            return read_description(config)
        return None if start is None else Pretrained(Path(start), description_of(start))

    def build_student(self) -> Network:
        """The network to train, with its initial weights, or any where a checkpoint has them: the same on every rank.

        Raises ConfigError for weights that do not fit, and for train.freeze.
        """
        torch.manual_seed(self.config.seed)
        network = self.build_student_without_weights()
        network.new = self.start_student(network).new
        freeze(network, self.config.train.freeze, network.new)
        return network

    def start_student(self, network: Network, *, values: bool = False) -> Start:
        """Load the weights from which the student starts. Of a run that has begun, return what was new then.

        values: as ``start_from`` has it.
        """
        start = self.config.student.start
        if start is None:
            return Start(frozenset(network.model.state_dict()), ())
        if saved_steps(self.config.run_dir / CHECKPOINTS) and self.has_begun:  # without a checkpoint it starts again
            noted = noted_networks(self.config).get("student", {}).get("new")
            if noted is not None:
                return Start(frozenset(noted), ())
        return start_from(network, start, classes=self.train_set.classes, values=values)

    def build_student_without_weights(self) -> Network:
        """The student's network for weights that come from elsewhere, such as a checkpoint's."""
        config, source = self.config, self.source
        name, kwargs = config.student.name, config.student.kwargs
        if source is not None and source.architecture and name.startswith((HUB, FOLDER)):  # as it was resolved
            name, kwargs = described_model(name, source, kwargs)
        return build_network(
            name,
            kwargs,
            num_classes=self.num_classes,
            image_size=config.data.image_size,
            teachers=tuple(config.teachers),
            description={} if source is None else source.description,
            own_size=config.student.image_size,
        )

    def build_on_meta(self) -> tuple[Network, list[Network]]:
        """The student, frozen as it is trained, and its teachers, on the meta device: shapes without memory."""
        with torch.device("meta"):
            teachers = [self.build_teacher_without_weights(teacher) for teacher in self.config.teachers.values()]
            return self.build_student(), teachers

    def build_teacher_without_weights(self, teacher: TeacherConfig) -> Network:
        return build_teacher_without_weights(
            teacher, classes=self.train_set.classes, image_size=self.config.data.image_size
        )

    def load_teacher(self, name: str, teacher: TeacherConfig) -> Teacher:
        return load_teacher(
            name,
            teacher,
            self.config.distill,
            classes=self.train_set.classes,
            image_size=self.config.data.image_size,
            device=self.world.device,
        )


def prepare(
    config: RunConfig,
    teacher_run_configs: Mapping[str, RunConfig],
    world: World,
    *,
    same_run: bool,
    fresh: bool = False,
) -> PreparedRun:
    """Collective. Check the run and its teachers' runs, and open the data. Prints what is to be said of weights and
    precision. Raises ConfigError.

    teacher_run_configs: from ``cli.resolve_teacher_runs``. same_run: refuse a run folder begun with other settings.
    fresh: what is in the run folder is going to be set aside.
    """
    setups = run_on_all_ranks(world, lambda: check_all_settings(config, teacher_run_configs, world, same_run=same_run))
    first_on_each_node(world, lambda: fetch_weights((config, *teacher_run_configs.values()), fresh=fresh))
    noted = run_on_all_ranks(world, lambda: {} if fresh else versions_of(config, teacher_run_configs))
    versions = broadcast(world, noted)
    images = first_on_each_node(world, lambda: open_images(config.data, versions.values()))
    if world.is_main:
        for note in dict.fromkeys(
            note for readers in images.values() for each in readers for note in each.source.notes
        ):
            print(note, flush=True)
    prepared = with_images(config, teacher_run_configs, setups, images, versions=versions, fresh=fresh)
    # Values are read on one rank: they take a second per gigabyte, and ranks compare the files' hashes later.
    for line in run_on_all_ranks(
        world,
        lambda: check_networks(prepared, values=world.is_main) + slow_precisions(config, world.device),
    ):
        if world.is_main:
            print(line, flush=True)
    return prepared


def versions_of(config: RunConfig, teacher_run_configs: Mapping[str, RunConfig]) -> dict[str, StreamVersions]:
    """The versions of the stream that each run goes on with, by teacher, and under STUDENT."""
    configs = {STUDENT: config, **teacher_run_configs}
    return {name: noted_versions(each.run_dir) for name, each in configs.items()}


def has_begun(config: RunConfig) -> bool:
    """Whether the run has a checkpoint, or results."""
    return bool(saved_steps(config.run_dir / CHECKPOINTS)) or (config.run_dir / RESULTS).exists()


def noted_networks(config: RunConfig) -> dict[str, Any]:
    """The content of a run's networks.json; empty without one, and for one that is damaged."""
    try:
        content = json.loads((config.run_dir / NETWORKS).read_text())
    except (OSError, ValueError):
        return {}
    parts = ("student", "teachers", "asked")
    return content if isinstance(content, dict) and all(isinstance(content.get(each), dict) for each in parts) else {}


def fetch_weights(configs: Iterable[RunConfig], *, fresh: bool = False) -> None:
    """Find all weights that the runs need, which puts downloads into the cache. Raises as ``find_pretrained``.

    A run that has begun needs those no more from which it started.
    """
    for config in configs:
        wanted: list[tuple[str, str | None]] = []
        for name, teacher in config.teachers.items():
            which = "weights" if teacher.weights else "pretrained"
            wanted += [(f"teachers.{name}.{which}", teacher.advises_with), (f"teachers.{name}.model", teacher.model)]
        if fresh or not has_begun(config):
            which = "weights" if config.student.weights else "pretrained"
            wanted += [(f"student.{which}", config.student.start), ("student.name", config.student.name)]
        for setting, value in wanted:
            is_model = setting.endswith((".model", ".name"))
            if value is not None and (not is_model or value.startswith((HUB, FOLDER))):
                with naming(f"{setting}={value}"):
                    find_pretrained(value)


def check_all_settings(
    config: RunConfig, teacher_run_configs: Mapping[str, RunConfig], world: World, *, same_run: bool
) -> dict[str, EngineSetup]:
    """Check all that needs neither data nor networks. Returns the engine setups, by teacher, and under STUDENT."""
    setups = {STUDENT: check_settings(config, world, same_run=same_run)}
    for name, teacher_config in teacher_run_configs.items():
        with naming(f"teacher {name}, recipe {config.teachers[name].recipe}"):
            setups[name] = check_settings(teacher_config, world, same_run=same_run)
    return setups


def with_images(
    config: RunConfig,
    teacher_run_configs: Mapping[str, RunConfig],
    setups: Mapping[str, EngineSetup],
    images: Mapping[int, tuple[Reader, Reader]],
    *,
    versions: Mapping[str, StreamVersions] = MappingProxyType({}),
    fresh: bool = False,
) -> PreparedRun:
    """The prepared run. setups: from ``check_all_settings``. images: to train and to evaluate on, by version of pixels.
    versions: with the keys of setups; those that are missing are the latest. fresh: as in ``prepare``.
    """

    def prepared(name: str, config: RunConfig, teacher_runs: Mapping[str, PreparedRun]) -> PreparedRun:
        begun, stream = not fresh and has_begun(config), versions.get(name, LATEST)
        return PreparedRun(config, setups[name], *images[stream.pixels], teacher_runs, begun, stream)

    teacher_runs = {name: prepared(name, each, {}) for name, each in teacher_run_configs.items()}
    return prepared(STUDENT, config, teacher_runs)


def check_settings(config: RunConfig, world: World, *, same_run: bool) -> EngineSetup:
    """Check one configuration: all that needs neither data nor networks. Returns its engine's setup."""
    check_config(config)
    setup = prepare_engine(config, world)
    read_policy(config.augment.policy)
    compiled = {
        "distill.compile": bool(config.teachers) and config.distill.compile is True,
        "engine.compile": config.engine.compile is True,
    }
    check_compiler(compiled, world.device.type, os.environ, python_headers())
    if same_run:
        check_same_run(config)
    return setup


def check_compiler(compiled: Mapping[str, bool], device_type: str, env: Mapping[str, str], headers: Path) -> None:
    """Raise ConfigError if torch.compile is used, and a compiler that it needs is missing.

    compiled: by setting, whether it is used there. headers: as ``compiler_lacks`` has it.
    """
    settings = [setting for setting, is_compiled in compiled.items() if is_compiled]
    if not settings:
        return
    if (lacking := compiler_lacks(device_type, env, headers)) is not None:
        way_out = " and ".join(f"{setting}=false" for setting in settings)
        raise ConfigError(f"torch.compile {lacking}, or set {way_out}")


def compiler_lacks(device_type: str, env: Mapping[str, str], headers: Path) -> str | None:
    """What torch.compile lacks there, and the way out; None: nothing. headers: the folder of Python.h, which Inductor's
    C++ and Triton's C both include.
    """
    if device_type == "cuda":
        lacking = triton_lacks(env, headers)
        return lacking and f"needs Triton on a GPU, and Triton {lacking}"
    compiler = env.get("CXX", "g++")
    program = shutil.which(compiler, path=env.get("PATH"))
    if program is None:
        return f"needs the C++ compiler {compiler}; install it"
    if (failure := _compiler_failure(program, "c++", "cmath", env)) is not None:
        return f"needs a C++ compiler, and {compiler} does not work ({failure}); mend it, or name another in CXX"
    return _headers_lack(headers)


def _compiler_failure(program: str, language: str, header: str, env: Mapping[str, str]) -> str | None:
    """Why a compiler cannot read a file with one of the headers that belong to it; None: it can."""
    last_word = "compiled_by_cit_scale"
    try:
        done = subprocess.run(
            [program, "-x", language, "-E", "-"],
            input=f"#include <{header}>\n{last_word}\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            env=dict(env),
        )
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error, 200)
    if done.returncode == 0 and last_word in done.stdout:
        return None
    return one_line(done.stderr.strip() or f"it ends with code {done.returncode} and reads nothing", 200)


def _headers_lack(headers: Path) -> str | None:
    if (headers / "Python.h").is_file():
        return None
    return f"needs Python's headers, and there is no {headers / 'Python.h'}; install them (python3-dev)"


def check_involution(network: Network, device_type: str, env: Mapping[str, str], headers: Path) -> None:
    """Raise ConfigError if the network has involutions, they run in Triton, and that lacks something to start.

    Without Triton they run as a loop, which says so. headers: see ``triton_lacks``.
    """
    if device_type != "cuda" or not any(isinstance(module, Involution2d) for module in network.modules()):
        return
    if importlib.util.find_spec("triton") is not None and (lacking := triton_lacks(env, headers)) is not None:
        raise ConfigError(f"its involutions run in Triton on a GPU, and Triton {lacking}")


def triton_lacks(env: Mapping[str, str], headers: Path) -> str | None:
    """What Triton lacks to build its access to the driver, in C, and the way out; None: nothing.

    It builds at the first launch of a process, unless it finds the result in its cache, and looks as
    triton/runtime/build.py does. headers: the folder of Python.h.
    """
    named = env.get("CC")
    candidates = ("gcc", "clang") if named is None else (named,)
    found = [program for each in candidates if (program := shutil.which(each, path=env.get("PATH")))]
    if not found:
        missing = "gcc or clang" if named is None else f"CC={named}"
        return f"needs a C compiler, and there is no {missing}; install gcc (or `module load gcc`), or name one in CC"
    if (failure := _compiler_failure(found[0], "c", "stdint.h", env)) is not None:
        return f"needs a C compiler, and {found[0]} does not work ({failure}); mend it, or name another in CC"
    return _headers_lack(headers)


def python_headers() -> Path:
    """The folder in which Triton and Inductor look for Python.h."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


def slow_precisions(config: RunConfig, device: torch.device) -> list[str]:
    """A line for each precision that the device has no instructions for, and computes by way of float32.

    A CPU without AVX512_BF16 or AMX takes 8.7 times as long for a step in bf16 as in float32.
    """
    if device.type != "cpu":
        return []
    given = {"engine.precision": config.engine.precision}
    if config.teachers:
        given["distill.teacher_precision"] = config.distill.teacher_precision
    supported = {"float32": lambda: True, "bf16": _has_bf16, "fp16": _has_fp16}
    return [
        f"{setting}={precision} is slower than float32 here, maybe many times: this CPU has no instructions for it; "
        f"set {setting}=float32"
        for setting, precision in given.items()
        if not supported[precision]()
    ]


def _has_bf16() -> bool:
    """Whether the CPU has instructions for bf16. On x86, oneDNN's own answer is yes for every CPU with AVX-512."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_fp16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def check_networks(prepared: PreparedRun, setting: str = "student.name", *, values: bool = True) -> list[str]:
    """Check that the networks can be built for this data, take its images, and that their weights fit. Returns what is
    to be said of the weights.

    On the meta device, where tensors have shapes and no memory: the networks that are trained are built later, once.
    setting: the one that names the network that is trained. values: read the given weights, too, and refuse those that
    are not finite.
    """
    config = prepared.config
    sizes = {
        "batch_size": prepared.batch_split.micro_batch_size,
        "image_size": config.data.image_size,
        "num_classes": prepared.num_classes,
    }
    try:
        _ = prepared.steps_per_epoch  # raises ValueError if the images do not fill one global batch
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if prepared.num_classes > len(prepared.train_set):
        raise ConfigError(
            f"data.train={config.data.train} has {prepared.num_classes} classes and {len(prepared.train_set)} images; "
            "give at least one image of each class"
        )
    said: list[str] = []
    with torch.device("meta"):
        with naming(f"{setting}={config.student.name}"):
            student = prepared.build_student_without_weights().train()
            try_forward(student, **sizes)
            check_involution(student, prepared.world.device.type, os.environ, python_headers())
        # A teacher's default, which goes for weights that say nothing, too.
        if setting == "student.name" and config.student.image_size == "own" and student.image_size is None:
            raise ConfigError(
                "student.image_size=own: the weights do not say what size they were made for; give a number"
            )
        source = f"{_start_setting(config, setting)}={config.student.start}"
        with naming(source) if config.student.start else contextlib.nullcontext():
            started = prepared.start_student(student, values=values)
        said += [f"{source}: {note}" for note in (*started.notes, *seen_before(config.student.start, config.data))]
        if config.student.name.startswith((HUB, FOLDER)) and config.student.start is None:
            said.append(
                f"{setting}={config.student.name}: the network alone is taken, not its weights; "
                f"{setting.rsplit('.', 1)[0]}.pretrained=true takes both"
            )
        for name, teacher in config.teachers.items():
            if teacher.advises_with is not None:
                with naming(f"teachers.{name}.model={teacher.model}"):
                    network = prepared.build_teacher_without_weights(teacher).eval()
                    try_forward(network, **sizes)
                    check_involution(network, prepared.world.device.type, os.environ, python_headers())
                which = "pretrained" if teacher.weights is None else "weights"
                with naming(f"teachers.{name}.{which}={teacher.advises_with}"):
                    notes = load_weights(network, teacher.advises_with, values=values)
                notes = (*notes, *seen_before(teacher.advises_with, config.data))
                said += [f"teachers.{name}.{which}: {note}" for note in notes]
    freeze(student, config.train.freeze, started.new)
    prepare_network(student, config.engine, prepared.world)
    parameter_groups(student, 0.0, config.optim.layer_decay, config.optim.head_lr_scale)
    for name, teacher_run in prepared.teacher_runs.items():
        with naming(f"teacher {name}"):
            said += check_networks(teacher_run, f"teachers.{name}.model", values=values)
    return said


def seen_before(weights: str | None, data: DataConfig) -> list[str]:
    """What to say of weights of a run that was trained on images which are evaluated on here; empty if none were.

    weights: a run folder, or a file in one. Goes by the paths to the data and the share that is held out.
    """
    folder = Path(weights or "").expanduser()
    try:
        theirs = yaml.safe_load((folder if folder.is_dir() else folder.parent).joinpath(CONFIG).read_text())["data"]
        train, evaluation, holdout = theirs["train"], theirs["eval"], float(theirs["holdout"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # of no run
        return []

    def same(one: str | None, other: str | None) -> bool:
        return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()

    # Of a class, a smaller share that is held out is a part of a larger one (datasets/sources.py).
    held_out_less = same(train, data.train) and data.eval is None and (evaluation is not None or holdout < data.holdout)
    if not held_out_less and not same(train, data.eval):
        return []
    how = f"--data.eval {evaluation}" if evaluation is not None else f"--data.holdout {holdout:g}"
    return [
        f"they were trained on images that are evaluated on here, which will look better than it is; give {how}, as "
        "their run had it"
    ]


def _start_setting(config: RunConfig, model_setting: str) -> str:
    """Name of the setting that names the weights from which the trained network starts."""
    return f"{model_setting.rsplit('.', 1)[0]}.{'weights' if config.student.weights else 'pretrained'}"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of a ConfigError with ``what`` it is about."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{what}: {error}") from error


def open_images(data: DataConfig, versions: Iterable[StreamVersions] = ()) -> dict[int, tuple[Reader, Reader]]:
    """The training and the evaluation set, by each version of pixels that is asked for; none: the latest.

    Raises ConfigError, and BadDataError for too many unusable images.
    """
    opened = {}
    try:
        for number in sorted({each.pixels for each in versions} or {LATEST.pixels}):
            pixels = BY_VERSION[number]
            train, evaluation = open_sources(data, pixels)
            refuse_bad_index((train, evaluation), data.max_bad_images)
            most_bytes = data.decoded_mib << 20
            opened[number] = Reader(train, pixels, most_bytes), Reader(evaluation, pixels, most_bytes)
            if data.verify:
                for reader in opened[number]:
                    reader.hashes = image_hashes(reader.source, cache_folder(data.cache_dir))
        return opened
    except ConfigError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        message = f"data.train={data.train!r}, data.eval={data.eval!r} cannot be opened: {error}"
        raise os_error(error, message, lasting=ConfigError) from error


def refuse_bad_index(sources: Sequence[Source], most: int) -> None:
    """Raise BadDataError if the index lists more unusable images than data.max_bad_images."""
    bad = [f"{source.name(index)} ({source.rejects[index]})" for source in sources for index in sorted(source.rejects)]
    if len(bad) > most:
        raise BadDataError(
            f"{len(bad)} images cannot be used, more than data.max_bad_images={most}: {shorten(bad)}; "
            f"repair or remove them, or raise the limit"
        )


def check_same_runs(configs: Iterable[RunConfig]) -> None:
    """``check_same_run`` for each of them."""
    for config in configs:
        check_same_run(config)


def check_same_run(config: RunConfig) -> None:
    """Raise RefusedError if the run folder holds a run that was begun with other settings."""
    path = config.run_dir / CONFIG
    if not path.exists():
        return
    try:
        started_with = yaml.safe_load(path.read_text())
        if not isinstance(started_with, dict):
            raise ValueError(f"it holds no settings, but {started_with!r}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = f"{path} cannot be read ({one_line(error)}); mend it, or start over with --fresh"
        raise os_error(error, message, lasting=RefusedError) from error
    changed = changed_settings(started_with, config)
    if changed:
        raise RefusedError(
            f"{config.run_dir} holds a run with other settings; give this one another --name, set that one aside with "
            f"--fresh, or go on with it all the same with --override-resume ({shorten(changed, MOST_CHANGED)})"
        )


def set_aside(run_dir: Path, world: World) -> Path | None:
    """Collective. Rename the run folder to run_dir.1 (or .2, ...), so that nothing is lost.

    Returns the new path on rank 0, None on others and where there was no folder. Raises RefusedError if other runs lie
    in the folder, as 'pets/large' does in 'pets'.
    """

    def move() -> Path | None:
        others = runs_inside(run_dir) if world.is_main else []
        if others:
            raise RefusedError(
                f"{run_dir} cannot be set aside: other runs lie in it ({', '.join(map(str, others[:5]))}); move them, "
                "or give this run another --name"
            )
        if not world.is_main or not run_dir.exists():
            return None
        kept = rename_aside(run_dir)
        print(f"{run_dir} set aside as {kept}", flush=True)
        return kept

    with writing(run_dir):
        return run_on_all_ranks(world, move)


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn an OSError that all ranks raise into a RunError, which only rank 0 prints."""
    try:
        yield
    except OSError as error:
        message = f"{run_dir} cannot be written ({error}); when it can, the same command continues there"
        raise os_error(error, message, lasting=CannotWriteError) from error
