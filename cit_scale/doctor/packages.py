"""The installed packages, beside what this version of CiT-Scale asks for."""

from __future__ import annotations

import importlib
import importlib.metadata
import tomllib
from collections.abc import Sequence

from packaging.requirements import Requirement

from cit_scale.config import IS_CHECKOUT, REPOSITORY
from cit_scale.doctor.findings import Asked, Finding, failed, message_of, ok

NAMED = ("torch", "torchvision", "timm", "deepspeed", "nvidia-dali", "triton")  # in the row; the others in the JSON
DALI = "nvidia-dali-cuda"  # one build for each CUDA: either does
AGAIN = "install CiT-Scale again, in a new environment" + (": pip install -e ." if IS_CHECKOUT else "")


IMPORTED = ("torchvision", "timm", "deepspeed", "nvidia.dali.fn")  # what breaks beside another torch or CUDA


def check(asked: Asked) -> Finding:
    """Whether each package is there, new enough, and can be imported."""
    found = compare(required())
    if found.status != "failed" and (broken := not_importable(IMPORTED)):
        return failed("; ".join(broken), AGAIN, found.facts)
    return found


def required() -> Sequence[str]:
    """What CiT-Scale asks for: by a checkout's own file, which is newer than what was noted at its installation."""
    if IS_CHECKOUT:
        return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    return importlib.metadata.requires("cit-scale") or ()


def compare(required: Sequence[str]) -> Finding:
    """required: as in a package's metadata. Extras are left out."""
    installed: dict[str, str] = {}
    for each in importlib.metadata.distributions():  # in the order in which Python looks for them
        if each.name is not None:  # of a folder that an uninstallation has left
            installed.setdefault(each.name.lower().replace("_", "-"), each.version)
    wrong, facts = [], {}
    for line in required:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name.startswith(DALI):
            name = next((each for each in installed if each.startswith(DALI)), name)
        version = installed.get(name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version or 'is missing'}, asked for {requirement.specifier}")
        facts[name] = version or "missing"
    facts |= {"triton": installed["triton"]} if "triton" in installed else {}
    named = [f"{name} {version}" for name, version in facts.items() if name.startswith(NAMED)]
    if wrong:
        return failed("; ".join(wrong), AGAIN, facts)
    return ok(", ".join(named), facts)


def not_importable(modules: Sequence[str]) -> list[str]:
    """What is wrong with each of the modules that cannot be imported."""
    broken = []
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # of any library
            broken.append(f"{name} cannot be imported: {message_of(error)}")
    return broken
