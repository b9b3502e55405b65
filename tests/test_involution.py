"""Involution against a slow reference that unfolds x into patches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cit_scale.models.involution import Involution2d, involution


def unfolded(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """The same sum over a (B, C, K*K, H', W') buffer of patches."""
    batch, channels = x.shape[:2]
    groups, size, _, height, width = kernel.shape[1:]
    patches = F.unfold(x, size, padding=size // 2, stride=stride)
    patches = patches.view(batch, groups, channels // groups, size * size, height, width)
    weighted = patches * kernel.reshape(batch, groups, 1, size * size, height, width)
    return weighted.sum(3).view(batch, channels, height, width)


def draw(channels: int, groups: int, size: int, stride: int, height: int, width: int, batch: int = 2) -> list[Tensor]:
    """x and a kernel that fits it, float64."""
    generator = torch.Generator().manual_seed(channels + size + stride + height)
    kernel_shape = (batch, groups, size, size, -(-height // stride), -(-width // stride))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((batch, channels, height, width), kernel_shape)
    ]


CASES = {
    "7x7, two groups": (32, 2, 7, 1, 8, 9),
    "3x3, one group": (16, 1, 3, 1, 6, 6),
    "every channel its own group": (4, 4, 5, 1, 5, 7),
    "1x1": (6, 3, 1, 1, 4, 4),
    "stride 2, even size": (32, 2, 7, 2, 8, 8),
    "stride 2, odd size": (32, 2, 3, 2, 7, 9),
    "kernel larger than x": (4, 2, 7, 2, 3, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_equal_the_unfolded_sum(case):
    stride = case[3]
    x, kernel = draw(*case)
    out, expected = involution(x, kernel, stride), unfolded(x, kernel, stride)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    grad_out = torch.randn_like(expected)
    grads = torch.autograd.grad(out, (x, kernel), grad_out)
    expected_grads = torch.autograd.grad(expected, (x, kernel), grad_out)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_a_kernel_of_one_tap_shifts_the_image():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    kernel = torch.zeros(1, 1, 3, 3, 3, 4)
    kernel[:, :, 0, 2] = 1  # from the row above, the column to the right
    expected = [[0, 0, 0, 0], [1, 2, 3, 0], [5, 6, 7, 0]]
    assert involution(x, kernel)[0, 0].tolist() == expected


@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(stride):
    x, kernel = draw(4, 2, 3, stride, 5, 4)
    assert torch.autograd.gradcheck(involution, (x, kernel, stride))


def test_any_memory_layout_gives_the_same_values():
    x, kernel = (tensor.detach() for tensor in draw(32, 2, 3, 1, 8, 8))
    expected = involution(x, kernel)
    views = {
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second column": x.repeat_interleave(2, dim=3)[..., ::2],
        "channels last": x.contiguous(memory_format=torch.channels_last),
    }
    for name, view in views.items():
        torch.testing.assert_close(involution(view, kernel), expected, msg=name)
    kernel_view = kernel.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    torch.testing.assert_close(involution(x, kernel_view), expected)


def test_channels_last_goes_through_forward_and_backward():
    x, kernel = (tensor.detach().float() for tensor in draw(32, 2, 3, 1, 8, 8))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = involution(x, kernel)
    out.sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_summed_in_float32():
    x, kernel = (tensor.detach().bfloat16() for tensor in draw(32, 2, 7, 1, 9, 9))
    out = involution(x, kernel)
    assert out.dtype == torch.bfloat16
    # Equal, not close: the only rounding is the last one.
    assert torch.equal(out, involution(x.float(), kernel.float()).bfloat16())


def test_gradients_come_in_the_dtype_of_their_tensor():
    x, kernel = draw(16, 1, 3, 1, 4, 4)
    x, kernel = x.detach().float().requires_grad_(), kernel.detach().bfloat16().requires_grad_()
    out = involution(x, kernel)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, kernel.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)


class LargestTensor(TorchDispatchMode):
    """Watches every operation; ``elements`` is the size of the largest memory any of them gave out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_no_buffer_of_patches_is_made():
    x, kernel = (tensor.detach() for tensor in draw(64, 4, 7, 1, 16, 16))
    with LargestTensor() as ours:
        involution(x, kernel)
    with LargestTensor() as reference:
        unfolded(x, kernel, 1)
    padded = 2 * 64 * (16 + 6) ** 2
    assert ours.elements == max(padded, kernel.numel())  # views count as the whole memory they look into
    assert reference.elements == 49 * x.numel()


def test_an_empty_batch_gives_an_empty_output_and_zero_weight_gradients():
    module = Involution2d(16, 3, stride=2)
    x = torch.zeros(0, 16, 5, 5, requires_grad=True)
    out = module.eval()(x)
    out.sum().backward()
    assert out.shape == (0, 16, 3, 3)
    assert x.grad.shape == x.shape
    assert not module.span.weight.grad.any()


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "stride", "said"),
    [
        ((2, 16, 4), (2, 1, 3, 3, 4, 4), 1, "(2, 16, 4)"),
        ((2, 16, 4, 4), (2, 1, 9, 4, 4), 1, "(2, 1, 9, 4, 4)"),
        ((2, 16, 4, 4), (2, 1, 3, 3, 4, 4), 3, "not 3"),
        ((2, 16, 4, 4), (2, 1, 2, 2, 4, 4), 1, "odd size, not 2 x 2"),
        ((2, 16, 4, 4), (2, 1, 3, 5, 4, 4), 1, "not 3 x 5"),
        ((2, 16, 4, 4), (2, 3, 3, 3, 4, 4), 1, "16 channels, which is not a multiple of the kernel's 3 groups"),
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
    torch.testing.assert_close(out, unfolded(x, kernel, stride))
    # C * C/4 + 2 * C/4 + (C/4 + 1) * K*K * C/16
    assert sum(parameter.numel() for parameter in module.parameters()) == 32 * 8 + 2 * 8 + 9 * 9 * 2


def test_under_autocast_the_output_keeps_the_dtype_of_x():
    module = Involution2d(16, 3).eval()
    x = torch.randn(2, 16, 6, 6)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    assert module.span.weight.grad.dtype == torch.float32


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
