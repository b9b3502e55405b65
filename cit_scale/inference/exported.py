"""Opens the files of ``cit-scale export``: ONNX by onnxruntime, pt2 and TorchScript by torch. Runs no pickled code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cit_scale.errors import ConfigError, MissingInputError, RefusedError, one_line
from cit_scale.inference.interface import KEY, Interface, read_interface

HEAD = "logits"  # name of what comes out
NEEDS_EXTRA = "needs onnxruntime; pip install 'cit-scale[export]'"


@dataclass(frozen=True)
class Exported:
    """An exported file, opened.

    classify: images (B, 3, S, S) uint8, or (1, 3, H, W) of any size where ``interface.pixels``, to {HEAD: (B, K)}
    float32 on the CPU. noted: what else stands in the file. run_dir: the run that it was exported from, if it is there.
    """

    interface: Interface
    classify: Callable[[Tensor], dict[str, Tensor]]
    noted: dict[str, Any]

    @property
    def run_dir(self) -> Path | None:
        named = self.noted.get("run")
        return Path(named) if isinstance(named, str) and Path(named).is_dir() else None


def open_exported(path: Path, device: torch.device) -> Exported | None:
    """Open an exported file. None for anything else. Raises ConfigError, MissingInputError and RefusedError."""
    kind = kind_of(path)
    if kind is None:
        return None
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist")
    try:
        return {"onnx": _open_onnx, "pt2": _open_pt2, "torchscript": _open_torchscript}[kind](path, device)
    except (ConfigError, OSError):
        raise
    except Exception as error:  # each library raises its own for a file that is damaged or another's
        raise MissingInputError(f"{path} cannot be opened as {kind}: {one_line(error, 300)}") from error


def kind_of(path: Path) -> str | None:
    """onnx, pt2 or torchscript, by the name or, of files of torch's, by what is in them. None for anything else."""
    if path.suffix in (".onnx", ".pt2", ".torchscript"):
        return path.suffix[1:]
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = [name.split("/", 1)[-1] for name in archive.namelist()]
    if "archive_format" in names:
        return "pt2"
    return "torchscript" if "constants.pkl" in names and any(name.startswith("code/") for name in names) else None


def _open_onnx(path: Path, device: torch.device) -> Exported:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(f"{path} {NEEDS_EXTRA}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a batch is computed by one thread (turns.py)
    options.log_severity_level = 3  # errors alone
    # CUDA's first, where the GPU's build of onnxruntime is installed.
    known = [] if device.type == "cpu" else ["CUDAExecutionProvider"]
    providers = [each for each in (*known, "CPUExecutionProvider") if each in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    interface, noted = read_interface(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return _exported(interface, run, noted, path)


def _open_pt2(path: Path, device: torch.device) -> Exported:
    extra = {KEY: ""}
    with _tensors_alone(path):
        program = torch.export.load(path, extra_files=extra)
    interface, noted = read_interface(extra[KEY] or None, path)
    module = program.module().to(device)
    return _exported(interface, lambda images: module(images.to(device)).cpu(), noted, path)


def _open_torchscript(path: Path, device: torch.device) -> Exported:
    extra = {KEY: b""}
    module = torch.jit.load(io.BytesIO(path.read_bytes()), map_location=device, _extra_files=extra)
    interface, noted = read_interface(extra[KEY].decode() if extra[KEY] else None, path)
    return _exported(interface, lambda images: module(images.to(device)).cpu(), noted, path)


def _exported(interface: Interface, run: Callable[[Tensor], Tensor], noted: dict[str, Any], path: Path) -> Exported:
    """run: what goes in, to logits (B, K)."""

    @torch.inference_mode()
    def classify(images: Tensor) -> dict[str, Tensor]:
        ready = images.permute(0, 2, 3, 1).contiguous() if interface.pixels else images.float().div_(255)
        logits = run(ready).float()
        if logits.shape != (len(images), len(interface.classes)):
            raise ConfigError(
                f"{path} gives {tuple(logits.shape)} for {len(images)} images and names {len(interface.classes)} "
                "classes; export it again"
            )
        return {HEAD: logits}

    classify(torch.zeros(1, 3, interface.image_size, interface.image_size, dtype=torch.uint8))  # refuses it now
    return Exported(interface, classify, noted)


@contextlib.contextmanager
def _tensors_alone(path: Path) -> Iterator[None]:
    """Let torch.export.load read tensors and a program from a file, and nothing that could run code.

    It reads some parts by pickle, where need be without torch's restriction to tensors, and loads compiled libraries.
    Raises RefusedError for a file that would need either.
    """
    refusal = RefusedError(
        f"{path} holds more than a program and tensors, which can execute code when it is loaded; open files of "
        "cit-scale export alone"
    )
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "aotinductor" in name or name.endswith((".so", ".cpp")):
                raise refusal
            if name.endswith(".json") and any(
                "obj" in each for each in _values(json.loads(archive.read(name)), "path_name")
            ):
                raise refusal
    restricted = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(restricted)
    os.environ[restricted] = "1"
    try:
        yield
    except pickle.UnpicklingError:
        raise refusal from None
    finally:
        os.environ.pop(restricted) if before is None else os.environ.update({restricted: before})


def _values(content: Any, key: str) -> Iterator[str]:
    """All texts under a key, anywhere in what a JSON file holds."""
    if isinstance(content, dict):
        yield from (str(value) for name, value in content.items() if name == key)
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _values(each, key)
