"""What goes wrong in a rank of ``jobs``: functions of ``(world, *args)``, called before the trainer's ``main``.

``at`` names a place of the run and what happens there: ``(die,)``, ``(send, SIGTERM)``, ``(sleep,)`` and so on. Nothing
depends on time: a rank does it to itself when it gets there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cit_scale import train
from cit_scale.checkpoint import async_save
from cit_scale.checkpoint import store as checkpoint
from cit_scale.distributed.world import World
from cit_scale.run import networks, results

Action = tuple[Any, ...]
"""A function and its arguments."""


def everything(world: World, *sabotages: tuple[Any, ...]) -> None:
    """Several at once."""
    for function, *args in sabotages:
        function(world, *args)


def replace(world: World, module: Any, name: str, value: Any) -> None:
    """Set an attribute of a module, as a constant of the run."""
    setattr(module, name, value)


def retry_at_once(world: World) -> None:
    """A checkpoint that could not be written is due again right away instead of in a minute."""
    async_save.RETRY_S = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# What happens


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def send(*signums: int) -> None:
    for signum in signums:
        os.kill(os.getpid(), signum)


def sleep() -> None:
    time.sleep(600)


def sleep_with_the_interpreters_lock() -> None:
    """As a C function does that hangs without giving it back."""
    ctypes.PyDLL(None).sleep(600)


def fail(code: int, path: str = "") -> None:
    raise OSError(code, os.strerror(code), path)


def exhaust() -> None:
    """As torch's allocator does where a device's memory is used up."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")


def call(action: Action) -> None:
    function, *args = action
    function(*args)


def once(action: Action) -> Callable[..., None]:
    """A function of anything that does it the first time."""
    done = []

    def run(*_: Any) -> None:
        if not done:
            done.append(True)
            call(action)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Where


def at(world: World, rank: int | None, place: str, step: int, *action: Any) -> None:
    """Do ``action`` on ``rank`` (None: on each) when the run gets to a place.

    start: before there is an engine. compile: while step 1 is compiled; needs engine.compile. Of update ``step``,
    counted from 1: batch, before it; forward, in the midst of the last micro-step's; backward, after the last one;
    applied, after the update. save: as the checkpoint of ``step`` is being written, in its thread. evaluation: after
    the first batch of this process's evaluation number ``step``: in an undisturbed run 1 is the teacher's before the
    first update, 2 and 3 are the mid-run ones of the student and of its average, 4 and 5 theirs at the end.
    """
    if rank is None or rank == world.rank:
        PLACES[place](step, once(action))


def _at_start(step: int, act: Callable[..., None]) -> None:
    build = train.build_engine

    def build_engine(*args: Any) -> Any:
        act()
        return build(*args)

    train.build_engine = build_engine


def _at_compile(step: int, act: Callable[..., None]) -> None:
    """Dynamo traces as always; what is traced runs as it is, without a C++ compiler."""
    compile_ = torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        act()
        return graph.forward

    torch.nn.Module.compile = lambda module, *, mode, **options: compile_(module, backend=backend, **options)


def _in_step(hook: Callable[[Any, Callable[..., None]], None]) -> Callable[[int, Callable[..., None]], None]:
    def place(step: int, act: Callable[..., None]) -> None:
        inner = train.train_step

        def train_step(engine: Any, teachers: Any, batches: Any, prepared: Any, done: int, lr: float) -> Any:
            if done + 1 == step:
                hook(engine, act)
            return inner(engine, teachers, batches, prepared, done, lr)

        train.train_step = train_step

    return place


def _hook_forward(engine: Any, act: Callable[..., None]) -> None:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(True)
        if len(calls) == engine.micro_steps:
            act()

    engine.module.model.blocks[0].register_forward_hook(hook)


def _hook_after(name: str) -> Callable[[Any, Callable[..., None]], None]:
    def hook(engine: Any, act: Callable[..., None]) -> None:
        inner, calls = getattr(engine, name), []

        def method(*args: Any) -> Any:
            result = inner(*args)
            calls.append(True)
            if len(calls) == (engine.micro_steps if name == "backward" else 1):
                act()
            return result

        setattr(engine, name, method)

    return hook


def _at_save(step: int, act: Callable[..., None]) -> None:
    write = checkpoint._write

    def dying_write(files: Any, partial: Path) -> Any:
        if partial.name.startswith(f"step_{step:06d}"):
            act()
        return write(files, partial)

    checkpoint._write = dying_write


def _at_evaluation(number: int, act: Callable[..., None]) -> None:
    inner, calls = train.evaluate, []
    assert results.evaluate is networks.evaluate is inner

    def acting(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            act()

    def evaluate(forward: Any, batches: Iterable[Any], world: World) -> Any:
        calls.append(True)
        return inner(forward, acting(batches) if len(calls) == number else batches, world)

    train.evaluate = results.evaluate = networks.evaluate = evaluate


PLACES: dict[str, Callable[[int, Callable[..., None]], None]] = {
    "start": _at_start,
    "compile": _at_compile,
    "batch": _in_step(lambda engine, act: act()),
    "forward": _in_step(_hook_forward),
    "backward": _in_step(_hook_after("backward")),
    "applied": _in_step(_hook_after("step")),
    "save": _at_save,
    "evaluation": _at_evaluation,
}

# ---------------------------------------------------------------------------------------------------------------------
# Every touch of the disk by a checkpoint's writing


def on_disk_calls(
    world: World, rank: int, step: int, on_call: Callable[..., None], *args: Any, trace: str | None = None
) -> None:
    """``on_call(number, name, moment, half, *args)`` around all that touches the disk while ``rank`` saves ``step``.

    Calls are counted from 0. moment: before or after. half: does half of the call, before it; None where there is no
    half. An exception of on_call takes the call's place. trace: a file that gets the calls' names.
    """
    if world.rank != rank:
        return
    inside = threading.local()
    save = checkpoint.save

    def counting_save(run_dir: Path, saved_step: int, *rest: Any) -> Any:
        if saved_step != step:
            return save(run_dir, saved_step, *rest)
        inside.calls = 0
        try:
            return save(run_dir, saved_step, *rest)
        finally:
            del inside.calls

    def watched(owner: Any, name: str, half: Callable[..., None] | None = None) -> None:
        function = getattr(owner, name)

        def watching(*arguments: Any, **options: Any) -> Any:
            if not hasattr(inside, "calls"):
                return function(*arguments, **options)
            number, inside.calls = inside.calls, inside.calls + 1
            if trace is not None:
                with open(trace, "a") as file:
                    file.write(f"{name}\n")
            calls = inside.__dict__.pop("calls")  # what on_call or a half does itself is not counted
            try:
                on_call(number, name, "before", half and (lambda: half(*arguments, **options)), *args)
                result = function(*arguments, **options)
                on_call(number, name, "after", None, *args)
            finally:
                inside.calls = calls
            return result

        setattr(owner, name, watching)

    watched(Path, "mkdir")
    watched(Path, "write_text", _half_of_write_text)
    watched(Path, "rename")
    watched(Path, "replace")
    watched(Path, "chmod")
    watched(os, "fsync")
    watched(safetensors.torch, "save_file", _half_of_save_file)
    watched(shutil, "rmtree", _half_of_rmtree)
    checkpoint.save = counting_save


def _half_of_save_file(tensors: dict[str, Tensor], path: Path) -> None:
    data = safetensors.torch.save(tensors)
    path.write_bytes(data[: len(data) // 2])


def _half_of_write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode()[: len(text) // 2])


def _half_of_rmtree(path: Path, **_: Any) -> None:
    next(iter(path.iterdir())).unlink()


def die_at(number: int, name: str, moment: str, half: Callable[[], None] | None, point: int, when: str) -> None:
    """``on_call``: SIGKILL before, within or after call number ``point``."""
    if number != point:
        return
    if moment == "before" and when == "within":
        if half is not None:
            half()
        die()
    if moment == when:
        die()


def fail_at(
    number: int, name: str, moment: str, half: Callable[[], None] | None, failing: str, code: int, most: int
) -> None:
    """``on_call``: the first ``most`` calls of the name fail, half done."""
    if name == failing and moment == "before" and _failures.get(failing, 0) < most:
        _failures[failing] = _failures.get(failing, 0) + 1
        if half is not None:
            half()
        fail(code)


_failures: dict[str, int] = {}

FULL = errno.ENOSPC
READ_ONLY = errno.EROFS
