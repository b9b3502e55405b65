"""Runs the checks, each in a process of its own: a crash, a hang or an exit is found like anything else."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from cit_scale.doctor.findings import Asked, Finding, failed, message_of, not_here

LAST_LINES = 15  # of what a failed check has printed
QUICK_S, WHOLE_S = 60.0, 240.0  # after which a check is given up
REMOVE_S = 5.0  # for a check that is given up to remove its files
END_S = 5.0  # for the end of a process that is killed: one that waits for a device in the kernel does not end at all


Context = ForkServerContext | SpawnContext


class Check(NamedTuple):
    """A row of the table. module: with a function ``check(asked)``."""

    name: str
    module: str
    is_quick: bool = False
    """Also made with --quick."""

    uses_device: bool = True
    """Not made where the GPUs have failed: that would be the same fault again, or the same hang."""


# In this order: what later checks need comes first.
CHECKS = (
    Check("machine", "cit_scale.doctor.machine", is_quick=True, uses_device=False),
    Check("packages", "cit_scale.doctor.packages", is_quick=True, uses_device=False),
    Check("compilers", "cit_scale.doctor.compilers", is_quick=True, uses_device=False),
    Check("GPUs", "cit_scale.doctor.gpus", is_quick=True),
    Check("memory speed", "cit_scale.doctor.memory"),
    Check("collectives", "cit_scale.doctor.collectives"),
    Check("precision", "cit_scale.doctor.precision", is_quick=True),
    Check("involution", "cit_scale.doctor.kernels"),
    Check("JPEG decoder", "cit_scale.doctor.jpegs", is_quick=True),
    Check("augmentation", "cit_scale.doctor.pixels"),
    Check("engines", "cit_scale.doctor.engines"),
    Check("disk", "cit_scale.doctor.disk", is_quick=True, uses_device=False),
    Check("data stream", "cit_scale.doctor.stream"),
    Check("training step", "cit_scale.doctor.step"),
)


class Examined(NamedTuple):
    """A check's name, what it found, the seconds that it took, and, where it failed, the last lines that it printed."""

    name: str
    finding: Finding
    seconds: float
    printed: str


def examine(asked: Asked, checks: Sequence[Check] = CHECKS) -> Iterator[Examined]:
    """Make the checks one after another, so that none disturbs the timing of another one."""
    # What most checks need is imported once. Each check is a fork of that, with no device in use.
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["cit_scale.doctor.preload"])
    context: Context = forking
    found: dict[str, Finding] = {}
    with tempfile.TemporaryDirectory() as folder:
        for check in checks:
            if asked.quick and not check.is_quick:
                continue
            start, log = time.monotonic(), Path(folder) / check.module
            told = dataclasses.replace(asked, found=found)
            if check.uses_device and "GPUs" in found and found["GPUs"].status == "failed":
                finding = not_here("the GPUs have failed, see their row")
            else:
                try:
                    finding = _in_own_process(context, check.module, told, log)
                except (EOFError, OSError):  # what is imported for all ends their server: each imports for itself
                    context = multiprocessing.get_context("spawn")
                    finding = _in_own_process(context, check.module, told, log)
            found[check.name] = finding
            printed = _last_lines(log) if finding.status == "failed" else ""
            yield Examined(check.name, finding, time.monotonic() - start, printed)


def _in_own_process(context: Context, module: str, asked: Asked, log: Path) -> Finding:
    """Raises EOFError or OSError where no process can be started."""
    limit_s = QUICK_S if asked.quick else WHOLE_S
    receiver, sender = context.Pipe()
    process = context.Process(target=_answer, args=(module, asked, log, 0.8 * limit_s, sender))
    try:
        process.start()
        sender.close()  # this process's copy: with the check's own the pipe ends
        with contextlib.suppress(OSError):  # it has died, as is found below
            receiver.send("begin")  # one that is interrupted before knows no process to end, and that one has not begun
        if receiver.poll(limit_s):
            return receiver.recv()
        return failed(
            f"no answer within {limit_s:g} s",
            "what it waits for is below; a device that hangs needs its driver, or the machine, to be started again",
        )
    except EOFError:
        if process.pid is None:
            raise
        process.join(END_S)
        return _without_answer(process.exitcode)
    finally:
        receiver.close()
        if process.pid is not None:
            _end(process)


def _answer(module: str, asked: Asked, log: Path, patience_s: float, answer: Connection) -> None:
    """In the process of a check: when told to, make it and send what it finds; after ``patience_s`` write where it
    stands.
    """
    os.setpgid(0, 0)  # with the processes that the check starts
    signal.signal(signal.SIGTERM, _leave)
    signal.alarm(math.ceil(2 * patience_s))  # where nobody is left to give it up
    try:
        answer.recv()
    except EOFError:  # nobody waits, and the folder of the log may be gone
        os._exit(0)
    # Libraries leave files there, which are removed with it.
    tempfile.tempdir = os.environ["TMPDIR"] = str(log.parent)
    # Libraries print to either; stdout is for the table or the JSON alone.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable()
    faulthandler.dump_traceback_later(patience_s)
    try:
        finding = importlib.import_module(module).check(asked)
    except (Exception, SystemExit) as error:  # of any library
        finding = failed(
            message_of(error),
            "training would meet the same: mend what the message names, or install it again",
        )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what has answered is ended
    answer.send(finding)
    answer.close()
    sys.stdout.flush()
    os._exit(0)  # without the libraries' farewells, which can take seconds


class _Ended(BaseException):
    """The check is given up: what it has written for a while is removed on the way out."""


def _leave(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_IGN)  # it is sent to the group and to the process: twice
    raise _Ended


def _without_answer(code: int | None) -> Finding:
    """code: with which the process of a check has ended."""
    if code == -signal.SIGKILL:
        return failed("its process was killed", "probably out of memory: see dmesg, and give the job more memory")
    how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    return failed(
        f"its process {how} without an answer",
        "what it said last is below; install again what that names, or compare with a machine where it works",
    )


def _end(process: BaseProcess) -> None:
    """End the process of a check, and those that it has started."""
    for signum, patience_s in ((signal.SIGTERM, REMOVE_S), (signal.SIGKILL, END_S)):
        for send in (os.killpg, os.kill):  # it may not be the leader of a group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(process.pid or 0, signum)
        process.join(patience_s)


def _last_lines(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    return ""
