"""The GPU kernels: in Triton's interpreter where there is no GPU, for real where there is one."""

import os
import subprocess
import sys
import textwrap

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
