"""The compilers: the involution's C++ on a CPU, Triton's C on a GPU, and torch.compile need them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cit_scale.doctor.findings import Asked, Finding, failed, ok, warning
from cit_scale.models.involution_cpu import COMPILERS
from cit_scale.run.setup import compiler_lacks, python_headers, triton_lacks


def check(asked: Asked) -> Finding:
    """Whether each compiler reads its own headers, and Python's."""
    return judge(os.environ, python_headers(), has_gpu=torch.cuda.device_count() > 0)


def judge(env: Mapping[str, str], headers: Path, *, has_gpu: bool) -> Finding:
    """headers: the folder of Python.h. A GPU needs C alone: Triton compiles the involution and what is compiled."""
    found = {
        "C++": version_of(env.get("CXX"), COMPILERS, env) or "no C++ compiler",
        "C": version_of(env.get("CC"), ("gcc", "clang"), env) or "no C compiler",
    }
    says = f"{', '.join(found.values())}; Python.h in {headers}"
    lacking = triton_lacks(env, headers) if has_gpu else compiler_lacks("cpu", env, headers)
    if lacking is None:
        return ok(says, found)
    if has_gpu and importlib.util.find_spec("triton") is not None:  # a run refuses to start
        return failed(says, f"Triton, and with it the involution on a GPU, {lacking}", found)
    return warning(says, f"{'Triton' if has_gpu else 'torch.compile'} {lacking}", found)


def version_of(chosen: str | None, names: Sequence[str], env: Mapping[str, str]) -> str | None:
    """What the compiler says of itself, or its name where it says nothing; None: there is none.

    chosen: by the user. names: else the first of these that is there.
    """
    path = env.get("PATH")
    name = chosen or next((each for each in names if shutil.which(each, path=path)), None)
    program = name and shutil.which(name, path=path)
    if program is None:
        return name
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace", timeout=60, env=dict(env)
        )
        return told.stdout.partition("\n")[0].strip() or name
    return name
