"""Writes a file for deployment, which is measured before it gets its name: the work of ``cit-scale export``."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cit_scale.datasets.index import UNUSABLE, printable
from cit_scale.datasets.sources import Source, open_sources
from cit_scale.distributed.world import World
from cit_scale.errors import ConfigError, MissingInputError
from cit_scale.export import onnx
from cit_scale.export.program import Program, write_pt2, write_torchscript
from cit_scale.export.proof import CPU, RESIZED, TOLERANCES, Proof, Said, latency_ms, listen, prove, refuse_loss
from cit_scale.export.timm_folder import open_as_timm_does, write_timm_folder
from cit_scale.inference.classifier import (
    Classifier,
    OpenedNetwork,
    classifier_of,
    classifier_of_file,
    open_network,
)
from cit_scale.inference.defaults import SUFFIXES
from cit_scale.inference.entry import ON_THE_CPU, run_command
from cit_scale.inference.evaluate import known_images, open_images, run_config, run_pixels
from cit_scale.inference.exported import HEAD, open_exported
from cit_scale.inference.interface import Interface

CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Form:
    """What is to be written. kind: a key of SUFFIXES. precision: a key of TOLERANCES. any_size: whether images of any
    size go in, and are made ready inside.
    """

    kind: str
    precision: str = "float32"
    any_size: bool = False

    def __post_init__(self) -> None:
        if self.kind != "onnx" and (self.precision != "float32" or self.any_size):
            raise ConfigError(f"--precision and --any-size are for --to onnx; {self.kind} is written in float32")

    def file_name(self, weights: str) -> str:
        """A name for the file. weights: the name of those that it is of, such as student_ema."""
        parts = [weights, *([self.precision] if self.precision != "float32" else [])]
        name = "_".join([*parts, *(["any_size"] if self.any_size else [])])
        return f"{name}_timm" if self.kind == "timm" else name + SUFFIXES[self.kind]

    @property
    def resized_by(self) -> str | None:
        """What resizes images in place of the trainer's own program; None if nothing does."""
        return "timm's transform" if self.kind == "timm" else "the graph" if self.any_size else None

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES[self.precision], RESIZED if self.resized_by else 0.0)


def run(arguments: argparse.Namespace) -> int:
    """Run ``cit-scale export``. arguments: parsed by `cit_scale.export.commands`. Returns an exit code."""

    def work(world: World) -> None:
        if world.world_size > 1:
            raise ConfigError("cit-scale export runs in one process; start it without torchrun or srun")
        form = Form(arguments.to, arguments.precision, arguments.any_size)
        if form.kind == "onnx":
            onnx.require_packages()
        opened = open_network(arguments.model, world)
        for note in opened.notes:
            print(note, file=sys.stderr)
        out, proof = export(
            opened,
            form,
            out=arguments.out,
            data=arguments.data,
            calibration=arguments.calibration,
            num_calibration=arguments.calibration_images,
            allow_loss=arguments.allow_loss,
            threads=arguments.threads,
        )
        print_proof(out, proof, form)

    return run_command(work, needs_less_memory=ON_THE_CPU)


def export(
    opened: OpenedNetwork,
    form: Form,
    *,
    out: str | None = None,
    data: str | None = None,
    calibration: str | None = None,
    num_calibration: int = 256,
    allow_loss: bool = False,
    threads: int = 4,
) -> tuple[Path, Proof]:
    """Write and measure a file. Returns where it is, and what was measured.

    out: None: in the run folder. data: to measure on, as data.eval takes it; None: the run's evaluation set.
    calibration: for int8, as data.train takes it; None: the run's training set. num_calibration: images of it.
    allow_loss: keep a file that is worse than the student.
    Raises RefusedError for a file that is, ConfigError, and OSError where it cannot be written.
    """
    path = _target(opened, form, out)
    partial_path = path.with_name(f".{path.stem}.partial{SUFFIXES[form.kind]}")
    _remove(partial_path)
    partial_path.touch()  # says now if it cannot be written
    partial_path.unlink()
    student = classifier_of(opened, CPU)
    source, to_calibrate = open_images(student, data), calibration_source(student, form, calibration)
    judged = known_images(source, student, only_known=False)
    measure = Measured(
        listen(student, source, judged, threads), student, lambda each: listen(each, source, judged, threads)
    )
    try:
        if form.kind == "timm":
            partial_path.mkdir()
            write_timm_folder(opened, partial_path)
            proof = measure.prove(open_as_timm_does(partial_path, opened), form)
        else:
            images = partial(calibration_images, student, to_calibrate, num_calibration)
            proof = _write(opened, form, partial_path, measure, images, allow_loss=allow_loss)
        refuse_loss(proof, str(path), allowed=allow_loss)
        partial_path.replace(path)
    finally:
        _remove(partial_path)
    return path, proof


@dataclass(frozen=True)
class Measured:
    """What the student says, and how to ask a file."""

    said: Said
    student: Classifier
    ask: Callable[[Classifier], Said]

    def prove(self, classifier: Classifier, form: Form) -> Proof:
        said = self.ask(classifier)
        times = latency_ms(classifier, said.first), latency_ms(self.student, self.said.first)
        return prove(self.said, said, classifier, form.tolerance, *times)


def _write(
    opened: OpenedNetwork,
    form: Form,
    path: Path,
    measure: Measured,
    images: Callable[[], Iterator[Tensor]],
    *,
    allow_loss: bool,
) -> Proof:
    """Write a file of a program, in steps of which each is measured: in float32, then as asked.

    What is wrong with the program is seen in float32, where logits have to agree closely.
    """
    interface = dataclasses.replace(opened.interface, heads=(HEAD,))
    size = interface.image_size

    def proof_of(form: Form) -> Proof:
        exported = open_exported(path, CPU)
        assert exported is not None
        return measure.prove(classifier_of_file(str(path), exported), form)

    noted = partial(_noted, opened, form)
    program = Program(copy.deepcopy(opened.network))
    if form.kind != "onnx":
        write = {"pt2": write_pt2, "torchscript": write_torchscript}[form.kind]
        write(program, size, path, noted(interface))
        return proof_of(form)
    onnx.write_onnx(program, interface, path, noted(interface))
    plain = Form("onnx")
    proof = proof_of(plain)
    if form == plain:
        return proof
    refuse_loss(proof, "the file in float32, of which it would be made,", allowed=allow_loss)
    if form.precision == "fp16":
        onnx.write_fp16(path, path, interface, noted(interface))
    elif form.precision == "int8":
        onnx.write_int8(path, path, images())
        onnx.note_in(path, interface, noted(interface))
    if form.any_size:
        whole = dataclasses.replace(interface, pixels=True)
        onnx.put_making_ready_inside(path, whole, path, noted(whole))
    return proof_of(form)


def _noted(opened: OpenedNetwork, form: Form, interface: Interface) -> str:
    return interface.to_json(model=opened.network.architecture, precision=form.precision, weights=opened.weights)


def _target(opened: OpenedNetwork, form: Form, out: str | None) -> Path:
    """Where the file goes. Raises ConfigError and MissingInputError."""
    if out is None:
        if opened.run_dir is None:
            raise ConfigError(f"{printable(opened.name)} is of no run that is here; say where to write with --out")
        path = opened.run_dir / form.file_name(opened.file.stem)
    else:
        path = Path(out)
    if form.kind == "timm":
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{printable(path)} exists and is not overwritten; give a new folder by --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    if path.is_dir():
        raise ConfigError(
            f"--out {printable(path)} is a folder; give a file, such as {path / form.file_name('student')}"
        )
    if not path.parent.is_dir():
        raise MissingInputError(f"--out {printable(path)} lies in no folder that exists")
    if path.suffix != SUFFIXES[form.kind]:
        raise ConfigError(f"--out {printable(path)} does not end in {SUFFIXES[form.kind]}, by which it is opened")
    return path


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def calibration_source(student: Classifier, form: Form, data: str | None) -> Source | None:
    """The images to calibrate on; None where none are needed. Raises ConfigError."""
    if form.precision != "int8":
        if data is not None:
            raise ConfigError(f"--calibration is for --precision int8, and this is {form.precision}; leave it out")
        return None
    if data is not None:
        return open_images(student, data, "--calibration")
    if student.run_dir is None:
        raise ConfigError("int8 is calibrated on images; say on which with --calibration DIR")
    return open_sources(run_config(student.run_dir).data, run_pixels(student.run_dir))[0]


def calibration_images(student: Classifier, source: Source | None, count: int) -> Iterator[Tensor]:
    """Images from the whole of a training set, (B, 3, S, S) float32 in [0, 1]."""
    assert source is not None  # for int8
    good = [sample for sample in range(len(source)) if sample not in source.rejects]
    chosen = [good[place] for place in np.linspace(0, len(good) - 1, min(count, len(good))).astype(int)]
    for first in range(0, len(chosen), CALIBRATION_BATCH):
        images = []
        for sample in chosen[first : first + CALIBRATION_BATCH]:
            with contextlib.suppress(*UNUSABLE):  # the others will do
                images.append(student.prepare(source.read(sample)))
        if images:
            yield torch.stack(images).float().div_(255)


def megabytes(path: Path) -> float:
    """Size of a file, or of the files in a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir())) / 1e6


def print_proof(path: Path, proof: Proof, form: Form) -> None:
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    table = Table(title=Text(f"{printable(shown)}, {megabytes(path):.2f} MB"), title_justify="left")
    for column in ("", "top-1 %", "ms for 1", "ms for 32", "images/s at 32"):
        table.add_column(column, justify="right" if column else "left")
    for name, top1, times in (
        ("student", proof.student_top1, proof.student_latency_ms),
        ("file", proof.top1, proof.latency_ms),
    ):
        table.add_row(name, f"{top1:.2f}", f"{times[1]:.2f}", f"{times[32]:.1f}", f"{32e3 / times[32]:.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"on one thread; on {proof.images} images: {proof.changed} change their class; logits differ by at most "
        f"{proof.difference:.2g}, the largest is {proof.scale:.3g}"
        f"{f'; images are resized by {form.resized_by}' if form.resized_by else ''}",
        soft_wrap=True,
    )
    complaint = proof.complaint()
    if complaint is not None:
        console.print(f"kept by --allow-loss although {complaint}", soft_wrap=True, markup=False)
