"""The compilers: the involution's C++ on a CPU, Triton's C on a GPU, and torch.compile need them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from cit_scale.doctor.findings import Asked, Finding, ok, warning
from cit_scale.models.involution_cpu import COMPILERS
from cit_scale.run.setup import compiler_lacks, python_headers, triton_lacks


def check(asked: Asked) -> Finding:
    """Whether each compiler reads its own headers, and Python's."""
    return judge(os.environ, python_headers(), has_gpu=torch.cuda.device_count() > 0)


def judge(env: Mapping[str, str], headers: Path, *, has_gpu: bool) -> Finding:
    """headers: the folder of Python.h. A GPU needs C alone: Triton compiles the involution and what is compiled."""
    path = env.get("PATH")
    names = [env.get("CXX") or next((each for each in COMPILERS if shutil.which(each, path=path)), "no C++ compiler")]
    names += [
        env.get("CC") or next((each for each in ("gcc", "clang") if shutil.which(each, path=path)), "no C compiler")
    ]
    says = f"{', '.join(names)}; Python.h in {headers}"
    lacking = triton_lacks(env, headers) if has_gpu else compiler_lacks("cpu", env, headers)
    if lacking is None:
        return ok(says)
    user = "Triton, and with it the involution on a GPU," if has_gpu else "torch.compile"
    return warning(says, f"{user} {lacking}")
