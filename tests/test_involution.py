"""Involution: each implementation against a slow reference, and the operator that stands before them."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from involution_cases import CASES, TOLERANCE, draw, errors, on_gpu, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cit_scale.bench.involution import channels_last, unfold
from cit_scale.models import involution_cpu, involution_loop
from cit_scale.models.involution import Involution2d, _planar_span, implementation, involution

IMPLEMENTATIONS = {"C++": involution_cpu, "loop": involution_loop}


DEVICES = ["cpu", on_gpu]


@pytest.fixture(scope="module", autouse=True)
def _there_is_a_compiler():
    involution_cpu.load()  # or the tests below would compare the loop with itself


class Calls(TorchDispatchMode):
    """Records every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------------
# Implementations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_output_and_gradients_equal_the_unfolded_sum(implementation, case, dtype):
    tensors = [tensor.to(dtype) for tensor in draw(*case)]
    assert max(errors(implementation, case[3], *tensors)) < TOLERANCE[dtype]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_a_map_of_one_pixel_meets_the_middle_tap(implementation, stride):
    assert max(errors(implementation, stride, *draw(32, 2, 7, stride, 1, 1))) < 1e-12


@pytest.mark.parametrize("case", ["7x7, two groups", "40 channels a group", "stride 2, odd size"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_any_memory_layout_will_do(implementation, case):
    stride = CASES[case][3]
    x, kernel, grad_out = draw(*CASES[case])
    every_second = x.repeat_interleave(2, dim=3)[..., ::2]
    part_of_more = channels_last(torch.cat([x, x], dim=1))[:, : x.shape[1]]
    same_everywhere = grad_out[:, :, :1, :1].expand_as(grad_out)
    for tensors in (
        [channels_last(x), channels_last(kernel), channels_last(grad_out)],
        [channels_last(x), kernel, grad_out],
        [x, channels_last(kernel), channels_last(grad_out)],
        [every_second, kernel.flip(2).contiguous().flip(2), same_everywhere],
        [part_of_more, kernel.transpose(4, 5).contiguous().transpose(4, 5), grad_out],
    ):
        assert max(errors(implementation, stride, *tensors)) < 1e-12


@pytest.mark.filterwarnings("ignore:involution runs as a loop")
def test_half_precision_is_left_to_the_loop_on_a_cpu_and_right():
    x, kernel, _ = (tensor.half() for tensor in draw(*CASES["7x7, two groups"]))
    expected = unfold(x.double(), kernel.double(), 1)
    assert relative_error(involution(x, kernel), expected) < TOLERANCE[torch.float16]


def test_who_computes_follows_from_device_and_dtype(monkeypatch):
    choose = implementation.__wrapped__
    triton = pytest.importorskip("cit_scale.models.involution_triton", reason="Triton is not installed")
    assert choose("cpu", torch.bfloat16) is involution_cpu
    assert choose("cuda", torch.bfloat16) is triton
    for device, dtype, reason in (
        ("cpu", torch.float16, "the C\\+\\+ library has no torch.float16"),
        ("mps", torch.float32, "there is no code of its own for mps"),
        ("cuda", torch.float32, "Triton is not installed"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.warns(UserWarning, match=f"runs as a loop in PyTorch, .* memory: {reason}"):
            assert choose(device, dtype) is involution_loop


def test_bfloat16_is_summed_in_float32_and_rounded_once():
    x, kernel, grad_out = (tensor.bfloat16() for tensor in draw(*CASES["7x7, two groups"]))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, kernel)]
        out = involution(*inputs)
        results.append([tensor.bfloat16() for tensor in (out, *torch.autograd.grad(out, inputs, grad_out.to(dtype)))])
    for rounded, wide in zip(*results, strict=True):
        assert torch.equal(rounded, wide)


def test_bfloat16_keeps_infinities_and_nans():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.38e38]).bfloat16().view(1, 4, 1, 1)
    out = involution(x, torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bfloat16))
    assert torch.equal(out.nan_to_num(nan=7.0), x.nan_to_num(nan=7.0))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_number_of_threads_changes_no_bit(stride):
    x, kernel, grad_out = (tensor.float() for tensor in draw(64, 4, 7, stride, 28, 28, batch=3))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            inputs = [x.clone().requires_grad_(), kernel.clone().requires_grad_()]
            out = involution(*inputs, stride)
            results.append([out, *torch.autograd.grad(out, inputs, grad_out)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


class LargestTensor(TorchDispatchMode):
    """Watches every operation; ``elements`` is the size of the largest memory any of them gave out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_the_loop_makes_no_buffer_of_patches():
    x, kernel, out = draw(64, 4, 7, 1, 16, 16)
    with LargestTensor() as ours:
        involution_loop.forward(x, kernel, 1, out)
    with LargestTensor() as reference:
        unfold(x, kernel, 1)
    padded = 2 * 64 * (16 + 6) ** 2
    assert ours.elements == max(padded, kernel.numel())  # views count as the whole memory they look into
    assert reference.elements == 49 * x.numel()


# ---------------------------------------------------------------------------------------------------------------------
# The library


def run_python(program: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | env, capture_output=True, text=True, check=True
    )


SUM_OF_ONES = """
import torch
from cit_scale.models.involution import involution
for dtype in (torch.float32, torch.float64):
    print(involution(torch.ones(1, 16, 4, 4, dtype=dtype), torch.ones(1, 1, 3, 3, 4, 4, dtype=dtype)).sum().item())
"""  # 16 channels, each with (2 + 3 + 3 + 2) ** 2


@pytest.mark.slow
def test_it_is_built_once_and_says_so(tmp_path):
    first = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path))
    second = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path), CXX="/no/compiler/is/needed/now")
    assert first.stdout == second.stdout == "1600.0\n1600.0\n"
    assert first.stderr.count("building the involution") == 1
    assert "involution" not in second.stderr
    assert [path.suffix for path in sorted(tmp_path.glob("cit_scale/*"))] == [".lock", ".so"]


@pytest.mark.slow
def test_a_library_in_a_cache_that_cannot_be_written_is_used(tmp_path):
    (tmp_path / "cit_scale").mkdir()
    name = f"involution-{involution_cpu._fingerprint()}.so"
    (tmp_path / "cit_scale" / name).symlink_to(involution_cpu.cache_dir() / name)
    done = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path), CXX="/no/compiler/is/needed/now")
    assert done.stdout == "1600.0\n1600.0\n"
    assert [path.name for path in tmp_path.glob("cit_scale/*")] == [name]  # not even a lock was made


def test_another_source_compiler_flag_or_cpu_is_another_library(tmp_path, monkeypatch):
    fingerprints = {involution_cpu._fingerprint()}
    monkeypatch.setattr(involution_cpu, "FLAGS", ("-O1",))
    fingerprints.add(involution_cpu._fingerprint())
    source = tmp_path / "involution.cpp"
    source.write_text("// another")
    monkeypatch.setattr(involution_cpu, "SOURCE", source)
    fingerprints.add(involution_cpu._fingerprint())
    monkeypatch.setattr(platform, "machine", lambda: "another")
    fingerprints.add(involution_cpu._fingerprint())
    assert len(fingerprints) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"CXX": "/no/such/compiler"}, "the C++ compiler /no/such/compiler does not run: "),
        ({"CXX": "/etc/passwd"}, "the C++ compiler /etc/passwd does not run: "),
        ({"CXX": "true"}, "the C++ compiler true does not run: "),
        ({"CXX": "g++ '"}, "the C++ compiler g++ ' does not run: No closing quotation"),
        ({"PATH": "/nowhere"}, "there is no C++ compiler (c++, g++, clang++). Install a C++ compiler, such as g++"),
    ],
)
def test_without_a_compiler_it_warns_once_and_computes_all_the_same(env, said, tmp_path):
    done = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path), **env)
    assert done.stdout == "1600.0\n1600.0\n"
    assert done.stderr.count(f"runs as a loop in PyTorch, several times slower and in more memory: {said}") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path), CXX=str(compiler))
    assert done.stdout == "1600.0\n1600.0\n"
    assert "cannot build involution.cpp: error: no space left" in done.stderr
    assert not list(tmp_path.glob("cit_scale/*.so"))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_build_and_nothing_else(tmp_path):
    (tmp_path / "file").touch()
    done = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert done.stdout == "1600.0\n1600.0\n"
    assert done.stderr.count("building the involution") == 1
    assert "cannot be kept for the next process: [Errno 20] Not a directory" in done.stderr


@pytest.mark.slow
def test_a_damaged_library_is_built_again(tmp_path):
    run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path))
    (library,) = tmp_path.glob("cit_scale/*.so")
    library.write_bytes(library.read_bytes()[:100])
    again = run_python(SUM_OF_ONES, XDG_CACHE_HOME=str(tmp_path))
    assert again.stdout == "1600.0\n1600.0\n"
    assert again.stderr.count("building the involution") == 1
    assert involution_cpu._open(library)
    empty = tmp_path / "empty.so"
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(empty)], check=True)
    with pytest.raises(OSError, match="lacks some of involution_forward"):
        involution_cpu._open(empty)


def test_without_a_home_the_library_is_of_this_process_alone(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(involution_cpu, "_load_from", lambda folder: folder)
    folder, _ = involution_cpu._find_or_build()
    assert not folder.exists()  # it was a temporary one
    assert "cannot be kept for the next process: Could not determine home" in capsys.readouterr().err


@pytest.mark.slow
def test_without_any_folder_to_build_in_it_is_the_loop(tmp_path):
    (tmp_path / "file").touch()
    no_folder = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "file")}
    program = f"import tempfile; tempfile.tempdir = '{tmp_path}/file'\n{SUM_OF_ONES}"
    done = run_python(program, **no_folder)
    assert done.stdout == "1600.0\n1600.0\n"
    assert "runs as a loop in PyTorch" in done.stderr


@pytest.mark.slow
def test_processes_that_start_together_build_it_once(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SUM_OF_ONES],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate() for process in started]
    assert [out for out, _ in said] == ["1600.0\n1600.0\n"] * 3
    assert sum(err.count("building the involution") for _, err in said) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "architecture"),
    [
        pytest.param(
            "g++", "x86-64", marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 CPU")
        ),
        pytest.param(
            "clang++", "native", marks=pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
        ),
    ],
)
def test_it_is_right_with_other_vectors_and_another_compiler(compiler, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    flags = [flag.replace("=native", f"={architecture}") for flag in involution_cpu.FLAGS]
    monkeypatch.setattr(involution_cpu, "FLAGS", flags)
    loaded = involution_cpu._load.__wrapped__()
    monkeypatch.setattr(involution_cpu, "load", lambda: loaded)
    for case in CASES.values():
        tensors = [tensor.float() for tensor in draw(*case)]
        assert max(errors(involution_cpu, case[3], *tensors)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# The operator


def test_a_kernel_of_one_tap_shifts_the_image():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    kernel = torch.zeros(1, 1, 3, 3, 3, 4)
    kernel[:, :, 0, 2] = 1  # from the row above, the column to the right
    expected = [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]
    assert involution(x, kernel)[0, 0].tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_differentiable_twice(stride, device):
    x, kernel, _ = (tensor.requires_grad_() for tensor in draw(4, 2, 3, stride, 5, 4, device=device))
    assert torch.autograd.gradcheck(involution, (x, kernel, stride))
    assert torch.autograd.gradgradcheck(involution, (x, kernel, stride))


@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_are_registered_as_pytorch_asks(device, stride, layout):
    x, kernel, grad_out = (layout(tensor).requires_grad_() for tensor in draw(4, 2, 3, stride, 5, 4, device=device))
    operators, is_channels_last = torch.ops.cit_scale, layout is channels_last
    torch.library.opcheck(operators.involution.default, (x, kernel, stride))
    torch.library.opcheck(
        operators.involution_grad_x.default, (grad_out, kernel, stride, *x.shape[2:], is_channels_last)
    )
    torch.library.opcheck(
        operators.involution_grad_kernel.default, (grad_out, x, stride, *kernel.shape[1:3], is_channels_last)
    )


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradient_that_is_wanted_is_computed(wanted):
    inputs = draw(16, 1, 3, 1, 4, 4)[:2]
    inputs[wanted].requires_grad_()
    out = involution(*inputs)
    with Calls() as calls:
        out.sum().backward()
    operators = torch.ops.cit_scale.involution_grad_x, torch.ops.cit_scale.involution_grad_kernel
    assert [operator in calls.called for operator in operators] == [wanted == 0, wanted == 1]


@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_output_and_gradients_come_in_the_layout_of_their_inputs(device, stride, layout):
    x, kernel, _ = (layout(tensor).requires_grad_() for tensor in draw(32, 2, 3, stride, 8, 8, device=device))
    out = involution(x, kernel, stride)
    out.sum().backward()  # a gradient without a layout of its own
    assert layout(out) is out
    assert x.grad.stride() == x.stride()
    assert kernel.grad.stride() == kernel.stride()


def test_the_operator_takes_any_layout():
    x, kernel, grad_out = draw(16, 1, 3, 1, 6, 6)
    x = x[:, :, :, :1].expand_as(x)
    kernel = kernel.transpose(4, 5)
    inputs = x.detach().requires_grad_(), kernel.detach().requires_grad_()
    out = involution(*inputs)
    expected = unfold(*inputs, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(each, inputs, grad_out) for each in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_one_and_an_empty_one(device):
    x, kernel, grad_out = draw(32, 2, 7, 2, 9, 8, batch=1, device=device)
    torch.testing.assert_close(involution(x, kernel, 2), unfold(x, kernel, 2), rtol=1e-12, atol=1e-12)
    empty = [tensor[:0].requires_grad_() for tensor in (x, kernel)]
    out = involution(*empty, 2)
    grads = torch.autograd.grad(out, empty, grad_out[:0])
    assert [tuple(tensor.shape) for tensor in (out, *grads)] == [(0, 32, 5, 4), (0, 32, 9, 8), (0, 2, 7, 7, 5, 4)]


@pytest.mark.parametrize("device", DEVICES)
def test_no_channels_give_an_empty_output_and_a_zero_gradient_of_the_kernel(device):
    x = torch.zeros(2, 0, 4, 4, device=device, requires_grad=True)
    kernel = torch.ones(2, 1, 3, 3, 4, 4, device=device, requires_grad=True)
    out = involution(x, kernel)
    out.sum().backward()
    assert out.shape == x.grad.shape == (2, 0, 4, 4)
    assert torch.equal(kernel.grad, torch.zeros_like(kernel))


def test_an_empty_batch_goes_through_the_module():
    module = Involution2d(16, 3, stride=2)
    x = torch.zeros(0, 16, 5, 5, requires_grad=True)
    out = module.eval()(x)
    out.sum().backward()
    assert out.shape == (0, 16, 3, 3)
    assert x.grad.shape == x.shape
    assert not module.span.weight.grad.any()


@pytest.mark.filterwarnings("ignore:involution runs as a loop")  # float16 on the CPU
@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_both_inputs_take_its_dtype(device):
    x, kernel, _ = (tensor.float().requires_grad_() for tensor in draw(16, 1, 3, 1, 6, 6, device=device))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            out = involution(x, kernel.bfloat16())
            double = involution(x.double(), kernel.double())
        assert torch.equal(out, involution(x.to(dtype), kernel.bfloat16().to(dtype)))
        assert double.dtype == torch.float64  # as a convolution leaves it
    out.float().sum().backward()
    assert x.grad.dtype == kernel.grad.dtype == torch.float32


def test_other_dtypes_and_mixtures_are_refused_by_name():
    x, kernel = torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 3, 3, 2, 2)
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.bfloat16"):
        involution(x, kernel.bfloat16())
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled), pytest.raises(ValueError, match=r"torch\.int64, torch\.int64"):
            involution(x.long(), kernel.long())
    with pytest.raises(ValueError, match="cpu, meta"):
        torch.ops.cit_scale.involution(x, kernel.to("meta"), 1)


def test_the_gradient_operators_refuse_what_does_not_fit():
    x, kernel, grad_out = draw(4, 2, 3, 2, 5, 4)
    operators = torch.ops.cit_scale
    with pytest.raises(ValueError, match=r"output of shape \(2, 4, 3, 2\), not \(2, 4, 2, 2\)"):
        operators.involution_grad_x(grad_out[:, :, 1:], kernel, 2, 5, 4, False)
    with pytest.raises(ValueError, match=r"needs a kernel of shape \(2, 2, 3, 3, 3, 2\), not \(2, 2, 3, 3, 2, 2\)"):
        operators.involution_grad_x(grad_out, kernel[..., 1:, :], 2, 5, 4, False)
    with pytest.raises(ValueError, match=r"output of shape \(2, 4, 3, 2\), not \(2, 3, 3, 2\)"):
        operators.involution_grad_kernel(grad_out[:, 1:], x, 2, 2, 3, False)


def test_compiled_and_exported_it_stays_one_node_of_one_graph():
    x, kernel, _ = (tensor.float() for tensor in draw(16, 1, 3, 2, 6, 5))

    class Twice(nn.Module):
        def forward(self, x, kernel):
            return 2 * involution(x, kernel, 2)

    expected = 2 * involution(x, kernel, 2)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Twice(), (x, kernel), dynamic_shapes=({0: batch}, {0: batch}))
    nodes = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.cit_scale.involution.default) == 1
    torch.testing.assert_close(exported.module()(x[:1], kernel[:1]), expected[:1])
    compiled = torch.compile(Twice(), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, kernel), expected)
    torch.testing.assert_close(compiled(x[:1], kernel[:1]), expected[:1])


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "stride", "said"),
    [
        ((2, 16, 4), (2, 1, 3, 3, 4, 4), 1, "(2, 16, 4)"),
        ((2, 16, 4, 4), (2, 1, 9, 4, 4), 1, "(2, 1, 9, 4, 4)"),
        ((2, 16, 4, 4), (2, 1, 3, 3, 4, 4), 3, "not 3"),
        ((2, 16, 4, 4), (2, 1, 2, 2, 4, 4), 1, "odd size, not 2 x 2"),
        ((2, 16, 4, 4), (2, 1, 3, 5, 4, 4), 1, "not 3 x 5"),
        ((2, 16, 4, 4), (2, 3, 3, 3, 4, 4), 1, "16 channels, which is not a multiple of the 3 groups"),
        ((2, 16, 4, 4), (2, 0, 3, 3, 4, 4), 1, "0 groups"),
        ((2, 16, 4, 4), (3, 1, 3, 3, 4, 4), 1, "(2, 1, 3, 3, 4, 4)"),
        ((2, 16, 5, 4), (2, 1, 3, 3, 2, 2), 2, "(2, 1, 3, 3, 3, 2)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(x_shape, kernel_shape, stride, said):
    with pytest.raises(ValueError, match=r"involution|kernel") as error:
        involution(torch.zeros(x_shape), torch.zeros(kernel_shape), stride)
    assert said in str(error.value)


@pytest.mark.parametrize("channels", [0, 8, 40])
def test_the_module_refuses_channels_that_do_not_split_into_groups_of_16(channels):
    with pytest.raises(ValueError, match=f"{channels} channels.*groups of 16"):
        Involution2d(channels, 3)


@pytest.mark.parametrize(
    ("stride", "size", "expected"), [(1, (7, 5), (7, 5)), (2, (7, 5), (4, 3)), (2, (8, 6), (4, 3))]
)
def test_the_module_computes_its_kernel_from_its_input(stride, size, expected):
    torch.manual_seed(0)
    module = Involution2d(32, 3, stride).double().eval()
    nn.init.normal_(module.bn.running_mean)
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    features = F.avg_pool2d(x, 2, ceil_mode=True) if stride == 2 else x
    features = F.relu(module.bn(F.conv2d(features, module.reduce.weight)))
    kernel = F.conv2d(features, module.span.weight, module.span.bias).view(2, 2, 3, 3, *expected)
    out = module(x)
    assert out.shape == (2, 32, *expected)
    torch.testing.assert_close(out, unfold(x, kernel, stride))
    # C * C/4 + 2 * C/4 + (C/4 + 1) * K*K * C/16
    assert sum(parameter.numel() for parameter in module.parameters()) == 32 * 8 + 2 * 8 + 9 * 9 * 2


def test_the_layout_for_a_gpu_changes_no_value():
    module = Involution2d(32, 7)
    features = torch.randn(2, 8, 5, 6)
    for layout in (Tensor.contiguous, channels_last):
        planar = _planar_span(layout(features), module.span.weight, module.span.bias)
        torch.testing.assert_close(planar, module.span(features))
        assert planar.is_contiguous()


def test_channels_last_goes_through_the_module_without_a_copy():
    module = Involution2d(32, 7, stride=2).eval().to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(2, 32, 12, 12))
    with torch.no_grad(), Calls() as calls:
        out = module(x)
    assert channels_last(out) is out
    aten = torch.ops.aten
    assert not {aten.clone, aten.copy_, aten._to_copy, aten.contiguous} & set(calls.called)
    assert torch.ops.cit_scale.involution in calls.called


def test_the_module_runs_in_low_precision_under_autocast():
    module = Involution2d(16, 3).eval()
    x = torch.randn(2, 16, 6, 6)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    assert module.span.weight.grad.dtype == torch.float32


@pytest.mark.slow
def test_compiled_with_inductor_it_gives_the_same_output_and_gradients():
    torch.manual_seed(0)
    module = Involution2d(16, 3).train()
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)
    grads = []
    for network in (module, compiled):
        out = network(x)
        grads.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
