"""Finds weights by name: files, folders, run folders, models of timm, and repositories of the Hugging Face hub.

hf-hub:OWNER/NAME[@REVISION]    a repository of the hub, downloaded into its cache (HF_HOME) once
local-dir:FOLDER                a folder in the hub's layout: config.json beside model.safetensors
regnety_040.ra3_in1k            a model of timm's, by name and tag: its repository on the hub
FOLDER                          a folder in the hub's layout, or the folder of a finished run
FILE                            a safetensors or PyTorch file
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import math
import re
import socket
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg

import cit_scale.models  # noqa: F401  registers ours with timm
from cit_scale.errors import ConfigError, MissingInputError, one_line, os_error
from cit_scale.files import file_sha256
from cit_scale.run_folder import (
    CHECKPOINTS,
    DESCRIPTION,
    RESULTS,
    STUDENT,
    STUDENT_BEST,
    STUDENT_EMA,
    STUDENT_EMA_BEST,
    saved_steps,
    step_path,
)

GIVEN_SIZE = "given_size"  # in config.json: the size of the images that the network is given, where it sees another

OTHER_LICENCE = "other"  # the hub's word for one that is not in its list

HUB = "hf-hub:"
FOLDER = "local-dir:"

# Names of weights in a folder or repository, in the order of preference. timm writes model.safetensors, the
# transformers library pytorch_model.bin before it did.
FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # of files of weights

CONNECT_S = 10.0  # longest wait for the hub's first answer


@dataclass(frozen=True)
class Pretrained:
    """Weights that were found by name.

    file: the weights. description: timm's pretrained_cfg of them, with mean and std of the images, num_classes and
    label_names; empty where the file comes without one. architecture, arguments: of timm.create_model, likewise.
    """

    file: Path
    description: Mapping[str, Any]
    architecture: str | None = None
    arguments: Mapping[str, Any] | None = None

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teachers that its heads beside the first are of, as far as the description says them."""
        names = (self.arguments or {}).get("teachers") or ()
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"model_args of {self.file.name} have teachers={names!r:.60}, which is no list of names")
        return tuple(names)

    @property
    def sha256(self) -> str:
        """Of the file. Computed once, as long as the file does not change."""
        about = self.file.stat()
        return _sha256(self.file, about.st_size, about.st_mtime_ns)


@functools.lru_cache
def _sha256(file: Path, size: int, modified_ns: int) -> str:
    return file_sha256(file)


def find_pretrained(name: str) -> Pretrained:
    """Find weights by name, and download what is not in the cache of the hub. The module says which names there are.

    Raises MissingInputError for what does not exist or cannot be downloaded, ConfigError for a description that cannot
    be read.
    """
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB))
    if name.startswith(FOLDER):
        if name == FOLDER:
            raise MissingInputError(f"{name} names no folder; write it behind the colon")
        return _from_folder(Path(name.removeprefix(FOLDER)).expanduser())
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if _is_timms(name):
        return _from_timm(name)
    if not path.exists() and "/" not in name and path.suffix not in SUFFIXES:
        known = timm.list_models(pretrained=True)
        raise MissingInputError(
            f"weights {name} do not exist: there is no such file, folder or model of timm's; the nearest of its "
            f"names are {nearest_models(name, known)}"
        )
    return _described(path)  # read_weights says what is wrong with the file


def _is_timms(name: str) -> bool:
    return "/" not in name and timm.is_model(name.split(".")[0]) and not Path(name).exists()


def description_of(*names: str | None) -> Mapping[str, Any]:
    """The description of the first of these weights that come with one; empty if none does. Downloads no weights."""
    for name in names:
        if not name:
            continue
        if name.startswith(HUB):
            config = _find_on_hub(name.removeprefix(HUB), (DESCRIPTION,))
            description = {} if config is None else read_description(config).description
        elif _is_timms(name):
            description = _timms_description(name).to_dict()
        else:
            description = find_pretrained(name).description
        if description:
            return description
    return {}


def timms_crop_ratio(image_size: int, crop_ratio: float) -> float:
    """The crop_pct with which timm resizes an image as this project's evaluation does: timm rounds down."""
    resized = round(image_size / crop_ratio)
    ratios = crop_ratio, image_size / resized, image_size / (resized + 0.5)
    return next(ratio for ratio in ratios if math.floor(image_size / ratio) == resized)


def own_crop_ratio(image_size: int, crop_pct: float) -> float:
    """The reverse of ``timms_crop_ratio``."""
    return image_size / math.floor(image_size / crop_pct)


def nearest_models(name: str, known: Sequence[str]) -> str:
    """The names that resemble ``name`` most, of its family if there is one: what stands before the first "_"."""
    family = [each for each in known if each.split("_")[0] == name.split("_")[0]]
    return ", ".join(difflib.get_close_matches(name, family or known, n=4, cutoff=0.0))


def _timms_description(name: str) -> PretrainedCfg:
    try:
        description = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        model = name.split(".")[0]
        known = timm.list_pretrained(f"{model}.*")
        hint = f"the nearest are {nearest_models(name, known)}" if known else f"there are none of {model}"
        raise MissingInputError(f"no pretrained weights are called {name!r}; {hint}") from None
    if description is None or not (description.hf_hub_id or description.url or description.file):
        raise MissingInputError(f"timm has no pretrained weights for {name}; give a file or a folder")
    return description


def _from_timm(name: str) -> Pretrained:
    description = _timms_description(name)
    if description.hf_hub_id:
        files = FILES if description.hf_hub_filename is None else (description.hf_hub_filename,)
        file = _find_on_hub(description.hf_hub_id, files)
        if file is None:
            raise MissingInputError(f"{HUB}{description.hf_hub_id} holds no weights: none of {', '.join(files)}")
    else:
        file = Path(description.file) if description.file else _download(str(description.url))
    return Pretrained(file, description.to_dict(), description.architecture)


def _from_folder(folder: Path) -> Pretrained:
    """Find weights in a folder in the hub's layout, or in the folder of a finished run."""
    # The weights of a run that is not finished change while it goes on: each rank and each start would find others.
    steps = saved_steps(folder / CHECKPOINTS)
    if steps and not (folder / RESULTS).exists():
        checkpoint = step_path(folder / CHECKPOINTS, max(steps)) / STUDENT
        raise MissingInputError(
            f"the run in {folder} is not finished, and its weights change; finish it, or give one of its states by its "
            f"path, such as {checkpoint}"
        )
    file = next((folder / file for file in (*FILES, STUDENT) if (folder / file).is_file()), None)
    if file is not None:
        return _described(file)
    raise MissingInputError(
        f"no weights are in the folder {folder}: neither {', '.join(FILES)} nor those of a run, {STUDENT}"
        + ("" if folder.is_dir() else "; there is no such folder")
    )


def _described(file: Path) -> Pretrained:
    """Add what stands of a file beside it, or of a checkpoint in its run folder."""
    if file.name not in (
        *FILES,
        STUDENT,
        STUDENT_EMA,
        STUDENT_BEST,
        STUDENT_EMA_BEST,
    ):  # a folder describes one network, and may hold other files
        return Pretrained(file, {})
    folder = file.absolute().parent
    config = (folder.parent.parent if folder.parent.name == CHECKPOINTS else folder) / DESCRIPTION
    return dataclasses.replace(read_description(config), file=file) if config.is_file() else Pretrained(file, {})


def read_description(config: Path) -> Pretrained:
    """Read a config.json in timm's form. One in another program's form says nothing. Raises ConfigError."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if "architecture" not in content:  # the transformers library's own, which describes its class
            return Pretrained(config, {})
        description = dict(content.get("pretrained_cfg", content))
        for key in ("num_classes", "label_names", GIVEN_SIZE):
            if key in content:
                description[key] = content[key]
        for key, (is_right, rule) in RULES.items():
            if key in description and not is_right(description[key]):
                raise ValueError(f"{key}={description[key]!r:.60} must be {rule}")
        if not isinstance(content["architecture"], str):
            raise ValueError(f"architecture={content['architecture']!r:.60} must be a name")
        if ("mean" in description) != ("std" in description):
            raise ValueError("of mean and std it has one; give both or none")
        return Pretrained(config, description, content["architecture"], dict(content.get("model_args") or {}))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{config} does not describe a model: {one_line(error)}") from error


def _are(kind: type | types.UnionType, holds: Callable[[Any], bool], counts: Sequence[int] = ()) -> Callable[..., bool]:
    """A test for lists of values of one kind, and of one of these lengths."""

    def is_right(values: Any) -> bool:
        if not isinstance(values, list) or (counts and len(values) not in counts):
            return False
        return all(isinstance(each, kind) and not isinstance(each, bool) and holds(each) for each in values)

    return is_right


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "mean": (
        _are(int | float, lambda value: -1 <= value <= 2, (1, 3)),
        "a number for each channel, for pixels in 0..1",
    ),
    "std": (_are(int | float, lambda value: 0 < value <= 4, (1, 3)), "a number above 0 for each channel, as the mean"),
    "input_size": (_are(int, lambda value: 0 < value <= 4096, (3,)), "three numbers of pixels, channels first"),
    "label_names": (_are(str, lambda value: True), "a list of texts"),
    "num_classes": (lambda value: isinstance(value, int) and value >= 0, "a number"),
    "hf_hub_filename": (lambda value: value is None or (isinstance(value, str) and bool(value)), "a file's name"),
    "crop_pct": (lambda value: isinstance(value, int | float) and 0.05 <= value <= 4, "a number from 0.05 to 4"),
    GIVEN_SIZE: (lambda value: isinstance(value, int) and 0 < value <= 4096, "a number of pixels"),
    "label_offset": (lambda value: value is None or (isinstance(value, int) and value >= 0), "a number"),
}
"""What a network takes from a description: a test for each value, and what the test asks for."""


def _from_hub(repository: str) -> Pretrained:
    """Find weights and description of a repository, given as OWNER/NAME or OWNER/NAME@REVISION."""
    config = _find_on_hub(repository, (DESCRIPTION,))
    found = None if config is None else read_description(config)
    named = None if found is None else found.description.get("hf_hub_filename")
    files = (named, *FILES) if named else FILES
    weights = _find_on_hub(repository, files)
    if weights is None:
        raise MissingInputError(f"{HUB}{repository} holds no weights: none of {', '.join(files)}")
    return Pretrained(weights, {}) if found is None else dataclasses.replace(found, file=weights)


@functools.cache
def _find_on_hub(repository: str, files: tuple[str, ...]) -> Path | None:
    """Find the first of these files that a repository has, and download it. None if it has none of them.

    The hub is asked with a short limit first: the library's own download repeats a failing request for 23 seconds. A
    hub that does not answer is not asked again by this process, and the cache has to do. Raises MissingInputError.
    """
    # Here, because it takes half a second, and most runs need no hub.
    import huggingface_hub as hub
    from huggingface_hub import errors

    name, _, revision = repository.partition("@")
    at = revision or None
    is_known = True  # of each file that was not found, that there is none
    try:
        for file in files:
            found = None if _UNREACHABLE else _ask_hub(name, file, at)
            if not found and _UNREACHABLE:
                found = hub.try_to_load_from_cache(name, file, revision=at)
            if isinstance(found, str):
                return Path(found)
            is_known &= not _UNREACHABLE or found is not None
    except errors.HFValidationError as error:
        raise MissingInputError(f"{HUB}{repository} is not OWNER/NAME: {one_line(error, 200)}") from error
    except errors.GatedRepoError as error:
        raise MissingInputError(
            f"{HUB}{repository} is gated; accept its terms on its page, and give a token by HF_TOKEN or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingInputError(f"{HUB}{repository}: there is no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingInputError(
            f"{HUB}{repository}: there is no such repository, or it is private; check the name, or give a token by "
            "HF_TOKEN"
        ) from error
    if is_known:
        return None
    what = "description, config.json," if files == (DESCRIPTION,) else "weights"
    raise MissingInputError(
        f"{HUB}{repository}: its {what} cannot be fetched ({one_line(_UNREACHABLE[0], 120)}), and the hub's "
        f"cache has none; on a machine with a network run `hf download {name}`, and bring its cache here (HF_HOME says "
        "where it is) or give the folder as local-dir:FOLDER"
    )


DISK_ERRORS = (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError)  # and no network's

_UNREACHABLE: list[Exception] = []
"""Why the hub did not answer this process, if it did not."""


def _ask_hub(name: str, file: str, revision: str | None) -> str | None:
    """Download a file into the hub's cache, unless it is there. None where there is none, or the hub does not answer.

    Raises the library's errors about a repository.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    download = functools.partial(hub.hf_hub_download, name, file, revision=revision, etag_timeout=CONNECT_S)
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file, revision=revision), timeout=CONNECT_S)
        return download()
    except errors.LocalEntryNotFoundError as error:  # the library's word for a hub that went away in between
        _UNREACHABLE.append(error)
    except errors.EntryNotFoundError:
        with contextlib.suppress(errors.EntryNotFoundError):
            download()  # which notes in the cache that there is none
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except OSError as error:
        if isinstance(error, DISK_ERRORS) or error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            message = f"{HUB}{name} cannot be kept: {one_line(error)}; let HF_HOME name a folder that can be written"
            raise os_error(error, message, lasting=MissingInputError) from error
        _UNREACHABLE.append(error)
    except Exception as error:  # each of its layers raises its own for a network that is not there
        _UNREACHABLE.append(error)
    return None


def _download(url: str) -> Path:
    """Download a file that is not on the hub into torch's cache (TORCH_HOME), once."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    in_name = re.search(r"-([0-9a-f]{8,})\.", path.name)  # how torch's own files say their SHA-256
    limit_s = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(CONNECT_S)  # for urllib, which torch gives none
        torch.hub.download_url_to_file(url, str(path), in_name and in_name[1], progress=False)
    except Exception as error:  # of a name, a connection, a length, a hash: each has its own
        raise MissingInputError(f"{url} cannot be downloaded ({one_line(error)}); bring the file to {path}") from error
    finally:
        socket.setdefaulttimeout(limit_s)
    return path
