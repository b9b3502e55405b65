"""The GPU kernels: in Triton's interpreter where there is no GPU, for real where there is one."""

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from involution_cases import CASES, HAS_GPU, TOLERANCE, draw, errors, needs_gpu, on_gpu

pytest.importorskip("triton", reason="Triton is not installed")

from cit_scale.bench.involution import channels_last
from cit_scale.models import involution_triton
from cit_scale.models.involution import Involution2d, involution

not_interpreted = pytest.mark.skipif(HAS_GPU, reason="with a GPU, Triton does not interpret")
DEVICES = [pytest.param("cpu", marks=not_interpreted, id="interpreted"), on_gpu]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_equal_the_unfolded_sum(case, device):
    tensors = [tensor.to(device) for tensor in draw(*case)]
    assert max(errors(involution_triton, case[3], *tensors)) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["3x3, one group", "stride 2, odd size"])
def test_low_precision_is_summed_in_float32(case, dtype, device):
    tensors = [tensor.to(device, dtype) for tensor in draw(*CASES[case])]
    assert max(errors(involution_triton, CASES[case][3], *tensors, out_dtype=torch.float32)) < 1e-6
    if not (device == "cpu" and dtype == torch.bfloat16):  # where the interpreter cuts off what a GPU rounds
        assert max(errors(involution_triton, CASES[case][3], *tensors)) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["3x3, one group", "stride 2, odd size"])
def test_any_memory_layout_will_do(case, device):
    stride = CASES[case][3]
    x, kernel, grad_out = (tensor.to(device) for tensor in draw(*CASES[case]))
    assert max(errors(involution_triton, stride, channels_last(x), kernel, channels_last(grad_out))) < 1e-12
    assert max(errors(involution_triton, stride, x, channels_last(kernel), grad_out)) < 1e-12
    every_second = x.repeat_interleave(2, dim=3)[..., ::2]
    same_everywhere = grad_out[:, :, :1, :1].expand_as(grad_out)
    assert max(errors(involution_triton, stride, every_second, kernel, same_everywhere)) < 1e-12


def test_an_image_too_spread_out_for_32_bits_is_copied_first():
    spread = torch.empty_strided((2, 17, 2, 2), (1, 2**27, 2, 1), device="meta")
    assert not involution_triton._has_short_steps(spread)
    assert involution_triton._has_short_steps(spread[:, :16])
    assert involution_triton._has_short_steps(torch.empty_strided((2**9, 16, 2, 2), (2**30, 1, 2, 1), device="meta"))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "stride"), [(80, 2), (90, 1), (90, 2)])
def test_the_kernels_compile_for_gpus_that_are_not_here(architecture, stride):
    # In a process of its own, which does not interpret. Loads of images take 8 channels at once.
    program = f"""
        import re
        import triton
        import triton.language as tl
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from cit_scale.models import involution_triton

        numbers = dict(GROUP_CHANNELS=16, CHANNELS=16, KERNEL_SIZE=7, STRIDE={stride}, SUM_DTYPE=tl.float32, BLOCK=64)
        for function in (involution_triton._forward, involution_triton._grad_x, involution_triton._grad_kernel):
            names = function.fn.arg_names
            adjacent = {{name: 1 for name in names if name.endswith("_c")}}  # channels last
            constants = numbers | adjacent
            signature = {{name: "constexpr" if name in constants else "i32" for name in names}}
            signature |= dict.fromkeys(names[:3], "*bf16")
            aligned = [name for name in names[:3] + names if name not in constants]
            source = ASTSource(
                fn=function.fn,
                signature=signature,
                constexprs={{(names.index(name),): value for name, value in constants.items()}},
                attrs={{(names.index(name),): [["tt.divisibility", 16]] for name in aligned}},
            )
            options = {{"num_warps": 4, **involution_triton.OPTIONS}}
            compiled = triton.compile(source, target=GPUTarget("cuda", {architecture}, 32), options=options)
            assert compiled.asm["cubin"]
            assert re.search(r"ld\\.global\\.v4\\.b32", compiled.asm["ptx"])
            assert re.search(r"fma\\.rn\\.f32", compiled.asm["ptx"])
    """
    done = run_uninterpreted(program)
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr  # Triton's warning where nothing is said


def run_uninterpreted(program, **env):
    env = {name: value for name, value in (os.environ | env).items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_output_is_written_where_it_lies_and_never_copied(monkeypatch):
    x, kernel, grad_out = draw(*CASES["3x3, one group"])
    expected = torch.empty_like(grad_out)
    involution_triton.forward(x, kernel, 1, expected)
    out = torch.zeros_like(grad_out).repeat_interleave(2, dim=3)[..., ::2]
    assert not out.is_contiguous()
    involution_triton.forward(x, kernel, 1, out)
    assert torch.equal(out, expected)

    # Tensors of 2**31 elements are not at hand.
    monkeypatch.setattr(involution_triton, "_has_short_steps", lambda tensor: tensor is not x)
    involution_triton.forward(x, kernel, 1, out.zero_())
    assert torch.equal(out, expected)
    monkeypatch.setattr(involution_triton, "_has_short_steps", lambda tensor: tensor is not out)
    with pytest.raises(AssertionError, match=r"output \(2, 16, 6, 6\) is too large for 32-bit offsets"):
        involution_triton.forward(x, kernel, 1, out)


# --- What is kept on disk ---

TUNED_ON_A_GPU = """
    import json, os, sys, time
    from pathlib import Path
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Gpu:
        "An H100 that compiles for itself and launches nothing. The third configuration is the fastest."
        measured = 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_benchmarker(self):
            return self.measure

        def measure(self, call, quantiles):
            call()
            time.sleep(0.3)
            self.measured += 1
            return [1.0 + abs(self.measured - 3)] * 3

    gpu, launched, was_there = Gpu(), [], []
    run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        kernel = run(function, *args, grid=grid, warmup=True, **options)
        launched.append([options["BLOCK"], kernel.metadata.enable_fp_fusion])

    driver.set_active(gpu)
    JITFunction.run = compile_only
    torch.cuda.get_device_name = lambda device: os.environ.get("TEST_GPU", "NVIDIA H100 80GB")
    triton.knobs.compilation.listener = lambda **about: was_there.append(about["cache_hit"])

    from cit_scale.models import involution_triton

    number, name = int(os.environ.get("TEST_PROCESSES", 1)), Path(os.environ["XDG_CACHE_HOME"])
    (name / f"ready {os.getpid()}").touch()
    while len(list(name.glob("ready *"))) < number:
        time.sleep(0.01)
    x, kernel, out = torch.ones(2, 16, 4, 4), torch.ones(2, 1, 3, 3, 4, 4), torch.empty(2, 16, 4, 4)
    before = dict(triton.knobs.cache.__dict__), os.environ.get("TRITON_CACHE_DIR")
    for _ in range(3):
        involution_triton.forward(x, kernel, 1, out)
    assert before == (triton.knobs.cache.__dict__, os.environ.get("TRITON_CACHE_DIR"))
    print(json.dumps([gpu.measured, was_there.count(False), launched[-2:]]))
"""


@pytest.mark.slow
def test_one_process_of_a_machine_measures_and_the_choice_is_kept_for_all(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "TEST_PROCESSES": "2", "TRITON_CACHE_DIR": str(tmp_path / "inductors")}
    command = [sys.executable, "-c", textwrap.dedent(TUNED_ON_A_GPU)]
    together = [subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=250) for process in together]
    results = [json.loads(out) if out else error for out, error in outputs]
    assert sorted(result[:2] for result in results) == [[0, 0], [4, 4]]  # measured, compiled
    assert all(result[2] == [[64, True]] * 2 for result in results)
    assert all(error.count("its fastest form measured") == 1 for _, error in outputs)  # who waits says so, too
    assert not any("FP_FUSION" in error for _, error in outputs)
    (folder,) = (tmp_path / "cit_scale" / "triton").iterdir()
    assert folder.name == "NVIDIA-H100-80GB"
    assert len(list(folder.glob("*/*.autotune.json"))) == 1
    assert not (tmp_path / "inductors").exists()

    later = run_uninterpreted(TUNED_ON_A_GPU, XDG_CACHE_HOME=str(tmp_path))
    assert json.loads(later.stdout) == [0, 0, [[64, True]] * 2], later.stderr
    assert later.stderr == ""
    elsewhere = run_uninterpreted(TUNED_ON_A_GPU, XDG_CACHE_HOME=str(tmp_path), TEST_GPU="NVIDIA H200")
    assert json.loads(elsewhere.stdout)[0] == 4, elsewhere.stderr


def test_who_waits_too_long_for_another_process_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(involution_triton, "TURN_S", 0.2)
    monkeypatch.setattr(involution_triton, "_say_what_is_waited_for", lambda: None)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with involution_triton._turn(tmp_path / "lock"):
            assert 0.2 <= time.monotonic() - began < 2
    with (
        involution_triton._turn(tmp_path / "lock"),
        (tmp_path / "lock").open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with involution_triton._turn(tmp_path / "no such folder" / "lock"):
        pass


def test_a_cache_that_cannot_be_written_leaves_tritons_own(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert involution_triton._cache_folder("a GPU without a folder") is None
    assert "cannot be kept for all ranks: [Errno 20] Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "says"), [(None, 1), (0, 1), (1, 0)])
def test_what_is_waited_for_is_said_once_and_by_rank_0(rank, says, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    involution_triton._say_what_is_waited_for.cache_clear()
    for _ in range(3):
        involution_triton._say_what_is_waited_for()
    involution_triton._say_what_is_waited_for.cache_clear()
    assert capsys.readouterr().err.count("the involution is compiled") == says


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_second_process_measures_nothing(tmp_path):
    program = """
        import torch
        from cit_scale.models.involution import involution
        x = torch.ones(2, 16, 8, 8, device="cuda")
        assert involution(x, torch.ones(2, 1, 3, 3, 8, 8, device="cuda"))[:, :, 1:-1, 1:-1].eq(9).all()
    """
    first, second = (run_uninterpreted(program, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stderr.count("its fastest form measured") == 1
    assert "its fastest form measured" not in second.stderr


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_module_gives_what_it_gives_on_a_cpu(compiled):
    torch.manual_seed(0)
    module = Involution2d(32, 7, stride=2)
    x = torch.randn(4, 32, 13, 16)
    results = []
    for device in ("cpu", "cuda"):
        network = module.to(device).train()
        images = x.to(device, memory_format=torch.channels_last).requires_grad_()
        out = (torch.compile(network, fullgraph=True) if compiled and device == "cuda" else network)(images)
        grads = torch.autograd.grad(out.square().sum(), [images, *network.parameters()])
        results.append([tensor.cpu() for tensor in (out, *grads)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_nothing_is_allocated_beside_inputs_and_outputs():
    x = torch.randn(32, 64, 56, 56, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(32, 4, 7, 7, 56, 56, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    kernel.requires_grad_()
    involution(x, kernel).sum().backward()  # tunes
    x.grad = kernel.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = involution(x, kernel)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + 2**20
    out.backward(torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 2 * out.nbytes + x.nbytes + kernel.nbytes + 2**20
