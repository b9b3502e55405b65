"""The installed packages, beside what this version of CiT-Scale asks for."""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Sequence

from packaging.requirements import Requirement

from cit_scale.config import IS_CHECKOUT, REPOSITORY
from cit_scale.doctor.findings import Asked, Finding, failed, ok

NAMED = ("torch", "torchvision", "timm", "deepspeed", "nvidia-dali", "triton")  # in the row; the others in the JSON
DALI = "nvidia-dali-cuda"  # one build for each CUDA: either does


def check(asked: Asked) -> Finding:
    """Whether each package is there, and new enough."""
    return compare(required())


def required() -> Sequence[str]:
    """What CiT-Scale asks for: by a checkout's own file, which is newer than what was noted at its installation."""
    if IS_CHECKOUT:
        return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    return importlib.metadata.requires("cit-scale") or ()


def compare(required: Sequence[str]) -> Finding:
    """required: as in a package's metadata. Extras are left out."""
    installed = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
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
        return failed("; ".join(wrong), "install CiT-Scale again in this environment: pip install -e .", facts)
    return ok(", ".join(named), facts)
