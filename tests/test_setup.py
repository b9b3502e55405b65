"""What a run is prepared from: its folder, its checkpoint, its student's weights."""

import dataclasses
import os
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import TINY_CIT

from cit_scale import cli
from cit_scale.config import EngineConfig, RunConfig, StudentConfig, TrainConfig
from cit_scale.data.reader import Reader
from cit_scale.distributed.world import World
from cit_scale.engines.build import prepare_engine
from cit_scale.errors import ConfigError, RefusedError
from cit_scale.models.involution import Involution2d
from cit_scale.run import setup
from cit_scale.run.progress import TrainingProgress, checkpoint_meta, restore
from cit_scale.run.setup import (
    CONFIG,
    PreparedRun,
    check_compiler,
    check_involution,
    check_same_run,
    python_headers,
    slow_precisions,
    triton_lacks,
)


def parse(*argv):
    return cli.parse_arguments(argv).config


@pytest.fixture
def prepared(tiny_digits, tmp_path):
    """``prepared(**student)``: a run on digits whose student has these settings."""

    def prepare(**student):
        config = RunConfig(
            runs_dir=str(tmp_path),
            student=StudentConfig(name="cit_tiny_patch16_224", kwargs=TINY_CIT, **student),
            engine=EngineConfig(name="plain"),
            train=TrainConfig(global_batch_size=64, micro_batch_size=64),
        )
        reader = Reader(tiny_digits)
        return PreparedRun(config, prepare_engine(config, World()), reader, reader, {})

    return prepare


@pytest.mark.parametrize("text", ["- a list", "just text", "{unclosed: ", "\x00"])
def test_a_run_folder_whose_settings_cannot_be_read_is_kept(text, prepared):
    config = prepared().config
    config.run_dir.mkdir()
    (config.run_dir / CONFIG).write_text(text)
    with pytest.raises(RefusedError, match=r"config.yaml cannot be read .* start over with --fresh"):
        check_same_run(config)
    assert (config.run_dir / CONFIG).read_text() == text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rng": [1]}, "the random numbers .* another version of NumPy"),
        ({"cursor": {"epoch": 7}}, r"the place in the data: \{'epoch': 7\} -> "),
        ({"inputs": {"data.train": "aaaa"}}, "data.train: aaaa -> bbbb"),
    ],
)
def test_a_checkpoint_that_would_go_on_elsewhere_is_refused_unless_insisted(change, named, prepared):
    run, inputs = prepared(), {"data.train": "bbbb"}
    meta = checkpoint_meta(TrainingProgress(step=3), run, inputs)
    assert restore(meta, run, inputs, override=False) == (TrainingProgress(step=3), [])
    with pytest.raises(RefusedError, match=rf"trained up to step 3 with something else \({named}"):
        restore(meta | change, run, inputs, override=False)
    progress, changed = restore(meta | change, run, inputs, override=True)
    assert progress.step == 3
    assert len(changed) == 1


def test_a_student_starts_from_the_weights_that_the_recipe_names(prepared, tmp_path):
    torch.manual_seed(1)
    state = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in prepared().build_student().model.state_dict().items()
    }
    save_file(state, tmp_path / "student.safetensors")
    loaded = prepared(weights=str(tmp_path / "student.safetensors")).build_student().model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("has_it", [True, False])
def test_a_precision_without_instructions_is_said_with_the_way_out(has_it, monkeypatch):
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**dict.fromkeys(names, lambda: has_it)))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    cpu = torch.device("cpu")
    slow = parse("--engine.precision=bf16", "--distill.teacher_precision=bf16")
    lines = slow_precisions(slow, cpu)
    assert [line.split(" ")[0] for line in lines] == (
        [] if has_it else ["engine.precision=bf16", "distill.teacher_precision=bf16"]
    )
    assert all("=float32" in line for line in lines)
    assert len(slow_precisions(parse("--engine.precision=fp16"), cpu)) == (0 if has_it else 1)
    alone = parse("--distill.teacher_precision=bf16", "--teachers=null")
    assert slow_precisions(alone, cpu) == slow_precisions(parse(), cpu) == []
    assert slow_precisions(slow, torch.device("cuda")) == []


def test_what_is_said_of_weights_and_precision_is_printed_once(prepared, tiny_digits, tmp_path, monkeypatch, capsys):
    state = prepared().build_student().model.state_dict()
    torch.save({"state_dict_ema": state, "state_dict": state}, tmp_path / "student.pth")
    config = prepared(weights=str(tmp_path / "student.pth")).config
    config = dataclasses.replace(config, engine=EngineConfig(name="plain", precision="bf16"))
    monkeypatch.setattr(setup, "open_images", lambda data, versions: {2: (Reader(tiny_digits), Reader(tiny_digits))})
    monkeypatch.setattr(setup, "_has_bf16", lambda: False)
    setup.prepare(config, {}, World(), same_run=True)
    average, taken, precision = capsys.readouterr().out.splitlines()
    named = f"student.weights={tmp_path}/student.pth: "
    assert average == f"{named}the moving average is taken: state_dict_ema, not state_dict"
    assert taken == f"{named}taken: all {len(state)} tensors"
    assert precision.startswith("engine.precision=bf16 is slower than float32 here")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of flags are those of x86")
def test_the_instructions_of_this_cpu_are_asked_for():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert setup._has_bf16() == bool({"avx512_bf16", "amx_bf16"} & set(flags))
    assert setup._has_fp16() == bool({"avx512_fp16", "amx_fp16"} & set(flags))


@pytest.fixture
def machine(tmp_path):
    """``machine(*programs)``: the environment of one with these programs, and a folder that has Python's headers."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()

    def with_programs(*programs, **more):
        folder = tmp_path / "_".join(["bin", *programs])
        folder.mkdir(exist_ok=True)
        for program in programs:
            (folder / program).write_text("#!/bin/sh\n/bin/cat\n")
            (folder / program).chmod(0o755)
        return {"PATH": str(folder), **more}, tmp_path / "include"

    return with_programs


BOTH = {"distill.compile": True, "engine.compile": True}
TEACHERS = {"distill.compile": True, "engine.compile": False}


def test_a_gpu_machine_with_what_triton_builds_with_is_content(machine):
    check_compiler(BOTH, "cuda", *machine("gcc"))
    check_compiler(BOTH, "cuda", *machine("clang"))
    check_compiler(BOTH, "cuda", *machine("mine", CC="mine"))
    check_compiler(dict.fromkeys(BOTH, False), "cuda", *machine())


@pytest.mark.parametrize(
    ("programs", "named", "missing"),
    [((), {}, "no gcc or clang; "), (("g++",), {}, "no gcc or clang; "), (("gcc",), {"CC": "icx"}, "no CC=icx; ")],
)
def test_a_gpu_machine_without_a_c_compiler_is_told_at_the_start(programs, named, missing, machine):
    with pytest.raises(ConfigError) as refused:
        check_compiler(TEACHERS, "cuda", *machine(*programs, **named))
    said = str(refused.value)
    assert missing in said
    assert said.endswith("or name one in CC, or set distill.compile=false")
    assert len(said) <= 490


def test_a_gpu_machine_without_pythons_headers_is_told_which(machine, tmp_path):
    env, _ = machine("gcc")
    with pytest.raises(ConfigError, match=r"no /.*/none/Python.h; install .* engine.compile=false"):
        check_compiler(BOTH, "cuda", env, tmp_path / "none")


def test_a_cpu_needs_a_cpp_compiler_and_pythons_headers(machine, tmp_path):
    check_compiler(BOTH, "cpu", *machine("g++"))
    check_compiler(BOTH, "cpu", *machine("mine", CXX="mine"))
    with pytest.raises(ConfigError, match=r"the C\+\+ compiler icx; install it, or set distill.compile=false and "):
        check_compiler(BOTH, "cpu", *machine("g++", CXX="icx"))
    env, _ = machine("g++")
    with pytest.raises(ConfigError, match=r"torch.compile needs Python's headers, .* no /.*/none/Python.h; install "):
        check_compiler(BOTH, "cpu", env, tmp_path / "none")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\necho 'error: no cc1plus' >&2\nexit 1\n", "error: no cc1plus"),
        ("#!/bin/sh\nexit 3\n", "it ends with code 3 and reads nothing"),
        ("#!/bin/sh\n", "it ends with code 0 and reads nothing"),
        ("#!/no/such/shell\n", "No such file or directory"),
    ],
)
def test_a_compiler_that_does_not_work_is_told_at_the_start(script, reason, machine):
    for device_type, variable, name in (("cpu", "CXX", "mine"), ("cuda", "CC", "mine")):
        env, headers = machine(name, **{variable: name})
        Path(env["PATH"], name).write_text(script)
        with pytest.raises(ConfigError, match=rf"mine does not work .*name another in {variable}, or set ") as refused:
            check_compiler(BOTH, device_type, env, headers)
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("program", "language", "header"),
    [
        pytest.param(*each, marks=pytest.mark.skipif(not shutil.which(each[0]), reason=f"needs {each[0]}"))
        for each in (("g++", "c++", "cmath"), ("gcc", "c", "stdint.h"))
    ],
)
def test_the_compiler_of_this_machine_works(program, language, header):
    assert setup._compiler_failure(shutil.which(program), language, header, os.environ) is None
    assert "nowhere.h" in setup._compiler_failure(shutil.which(program), language, "nowhere.h", os.environ)


@pytest.fixture
def command_of_triton(tmp_path, monkeypatch):
    """``command_of_triton()``: the command with which the installed Triton would compile, or why it has none."""
    build = pytest.importorskip("triton.runtime.build")
    commands = []
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **_: commands.append(command))

    def command():
        if hasattr(build, "_find_compiler"):  # a function of its own, which keeps what it has found, in newer ones
            build._find_compiler.cache_clear()
        build._build("name", "name.c", str(tmp_path), [], [], [], [])
        return commands[-1]

    yield command
    if hasattr(build, "_find_compiler"):
        build._find_compiler.cache_clear()


def test_the_headers_are_looked_for_where_the_installed_triton_does(command_of_triton):
    assert f"-I{python_headers()}" in command_of_triton()


def test_the_compilers_are_those_of_the_installed_triton(machine, command_of_triton, monkeypatch):
    for programs, more in ((("gcc", "clang"), {}), (("clang",), {}), (("mine",), {"CC": "mine"}), (("g++",), {})):
        env, headers = machine(*programs, **more)
        monkeypatch.setenv("PATH", env["PATH"])
        monkeypatch.delenv("CC", raising=False)
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        try:
            command_of_triton()
            finds = True
        except RuntimeError:
            finds = False
        assert (triton_lacks(env, headers) is None) == finds, (programs, more)


def test_a_cpu_needs_the_cpp_compiler_and_no_other(machine):
    check_compiler(BOTH, "cpu", *machine("g++"))
    with pytest.raises(ConfigError, match=r"compiler g\+\+; install it, or set distill.compile=false and engine"):
        check_compiler(BOTH, "cpu", *machine("gcc"))
    with pytest.raises(ConfigError, match=r"C\+\+ compiler icpx; "):
        check_compiler(BOTH, "cpu", *machine("g++", CXX="icpx"))


def test_involutions_on_a_gpu_need_the_c_compiler_without_torch_compile_too(machine, monkeypatch):
    with_one, without = torch.nn.Sequential(Involution2d(16, 3)), torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    for network, device_type in ((without, "cuda"), (with_one, "cpu")):
        check_involution(network, device_type, *machine())
    check_involution(with_one, "cuda", *machine("gcc"))
    with pytest.raises(ConfigError, match=r"its involutions run in Triton .* no gcc or clang; install gcc"):
        check_involution(with_one, "cuda", *machine())
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    check_involution(with_one, "cuda", *machine())  # the loop in PyTorch
