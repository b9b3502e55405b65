"""Opens the files of ``cit-scale export``: ONNX by onnxruntime, pt2 and TorchScript by torch.

A file may come from anywhere: what could run code or write files is refused before it is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
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
ONLY_OURS = "open files of cit-scale export alone"

# TorchScript's operators that reach out of it.
BY_FILE = re.compile(r"save|load|file|python|import", re.IGNORECASE)

# All that the sizes in a program of ours are made of: symbols of integers, and numbers with arithmetic.
SYMBOL = re.compile(r"Symbol\('\w+'(, (positive|integer|nonnegative)=True)*\)")
ARITHMETIC = re.compile(r"((Add|Mul|Integer|Max|Min|FloorDiv|Mod)\(|[\d\s,)-])*")

CHECKSUM_FORM = rb'"sha256": "[0-9a-f]{64}"'

NEEDS_EXTRA = "needs onnxruntime; pip install 'cit-scale[export]'"


@dataclass(frozen=True)
class Exported:
    """An exported file, opened.

    classify: images (B, 3, S, S) uint8, or (1, 3, H, W) of any size where ``interface.pixels``, to {HEAD: (B, K)}
    float32 on the CPU.
    """

    interface: Interface
    classify: Callable[[Tensor], dict[str, Tensor]]


def open_exported(path: Path, device: torch.device) -> Exported | None:
    """Open an exported file. None for anything else. Raises ConfigError, MissingInputError and RefusedError."""
    kind = kind_of(path)
    if kind is None:
        return None
    if not path.is_file():
        raise MissingInputError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    if damage := damage_in(path):
        raise MissingInputError(f"{path} is damaged: {damage}; bring it anew")
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


def damage_in(path: Path) -> str:
    """What a checksum finds: of a file of torch's, its parts'; of an ONNX file of ours, the one that is noted."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return "" if broken is None else f"its part {broken} has another checksum"
    data = path.read_bytes()
    noted = re.search(CHECKSUM_FORM, data)
    if noted is None or noted[0] == checksum_text(data, noted):
        return ""
    return "it has another checksum than is noted in it"


def add_checksum(path: Path) -> None:
    """Note the SHA-256 of a file in it, in the place that ``Interface.to_json`` keeps for one."""
    data = path.read_bytes()
    place = re.search(CHECKSUM_FORM, data)
    assert place is not None
    path.write_bytes(data[: place.start()] + checksum_text(data, place) + data[place.end() :])


def checksum_text(data: bytes, place: re.Match[bytes]) -> bytes:
    """What stands in the place of a file's checksum: the SHA-256 of all but it."""
    digest = hashlib.sha256(data[: place.start()] + data[place.end() :]).hexdigest()
    return f'"sha256": "{digest}"'.encode()


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
    interface = read_interface(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return _exported(interface, run, path)


def _open_pt2(path: Path, device: torch.device) -> Exported:
    """On the CPU whatever the device: the program asserts where its tensors are."""
    extra = {KEY: ""}
    with _tensors_alone(path):
        program = torch.export.load(path, extra_files=extra)
    interface = read_interface(extra[KEY] or None, path)
    return _exported(interface, program.module(), path)


def _open_torchscript(path: Path, device: torch.device) -> Exported:
    with zipfile.ZipFile(path) as archive:
        if any(b"__setstate__" in archive.read(name) for name in archive.namelist() if name.endswith(".py")):
            raise RefusedError(f"{path} runs methods when it is loaded; {ONLY_OURS}")
    extra = {KEY: b""}
    module = torch.jit.load(io.BytesIO(path.read_bytes()), map_location=device, _extra_files=extra)
    interface = read_interface(extra[KEY].decode() if extra[KEY] else None, path)
    strangers = sorted(set(_kinds(module.inlined_graph)) - {None})
    strangers = [kind for kind in strangers if not re.fullmatch(r"(aten|prim)::\w+", kind) or BY_FILE.search(kind)]
    if strangers:
        raise RefusedError(f"{path} does more than compute: {', '.join(strangers[:3])}; {ONLY_OURS}")
    return _exported(interface, lambda images: module(images.to(device)).cpu(), path)


def _kinds(block: Any) -> Iterator[str]:
    """Names of all operators in a graph of TorchScript."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds(inner)


def _exported(interface: Interface, run: Callable[[Tensor], Tensor], path: Path) -> Exported:
    """run: what goes in, to logits (B, K)."""

    @torch.inference_mode()
    def classify(images: Tensor) -> dict[str, Tensor]:
        ready = images.permute(0, 2, 3, 1).contiguous() if interface.pixels else images.float().div_(255)
        try:
            logits = run(ready).float()
        except RuntimeError as error:  # onnxruntime's are, too
            message = f"{path} cannot compute {tuple(ready.shape)}: {one_line(error, 300)}"
            raise ConfigError(message) from error
        if logits.shape != (len(images), len(interface.classes)):
            raise ConfigError(
                f"{path} gives {tuple(logits.shape)} for {len(images)} images and names {len(interface.classes)} "
                "classes; export it again"
            )
        return {HEAD: logits}

    classify(torch.zeros(1, 3, interface.image_size, interface.image_size, dtype=torch.uint8))  # refuses it now
    return Exported(interface, classify)


@contextlib.contextmanager
def _tensors_alone(path: Path) -> Iterator[None]:
    """Let torch.export.load read tensors and a program from a file, and nothing that could run code.

    It reads some parts by pickle, where need be without torch's restriction to tensors, loads compiled libraries, and
    evaluates expressions of sizes and guards as Python. Raises RefusedError for a file that would need any of it.
    """
    refusal = RefusedError(
        f"{path} holds more than a program and tensors, which can execute code when it is loaded; {ONLY_OURS}"
    )
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "aotinductor" in name or name.endswith((".so", ".cpp")):
                raise refusal
            content = json.loads(archive.read(name)) if name.endswith(".json") else None
            if any("obj" in str(each) for each in _values(content, "path_name")):
                raise refusal
            if any(each for each in _values(content, "guards_code")):
                raise refusal
            sizes = (SYMBOL.sub("1", str(each)) for each in _values(content, "expr_str"))
            if any(not ARITHMETIC.fullmatch(each) for each in sizes):
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


def _values(content: Any, key: str) -> Iterator[Any]:
    """All values under a key, anywhere in what a JSON file holds."""
    if isinstance(content, dict):
        yield from (value for name, value in content.items() if name == key)
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _values(each, key)
