"""Model FLOPs utilisation: how much of what the devices can compute goes into the arithmetic of the networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cit_scale.errors import one_line
from cit_scale.models.network import MOST, Network, Precision, fake_state
from cit_scale.run.setup import PreparedRun
from cit_scale.settings import decided

# Dense peak in FLOP/s by what stands in torch.cuda.get_device_name: with tensor cores (bf16, fp16), and without them
# (float32, as PyTorch computes matrix products unless TF32 is allowed). From NVIDIA's data sheets, whose figures with
# sparsity are twice the first number. The first row that matches counts.
PEAK_FLOPS: Mapping[str, tuple[float, float]] = {
    r"H200": (989e12, 67e12),
    r"H100 NVL": (835e12, 60e12),
    r"H100 PCIe": (756e12, 51e12),
    r"H100": (989e12, 67e12),
    r"A100": (312e12, 19.5e12),
    r"L40S": (362e12, 91.6e12),
    r"L4\b": (121e12, 30.3e12),
    r"V100": (125e12, 15.7e12),
    r"T4\b": (65e12, 8.1e12),
}


@dataclass(frozen=True)
class ModelFlops:
    """per_image: floating-point operations that one training image takes. peak: FLOP/s of all devices of the job."""

    per_image: float
    peak: float

    def utilisation(self, images_per_s: float) -> float:
        """From 0 to 1. images_per_s: of the whole job."""
        return images_per_s * self.per_image / self.peak


def model_flops(prepared: PreparedRun, device_name: str, say: Callable[[str], None]) -> ModelFlops | None:
    """None for a device whose peak is not known, and, with a line for ``say``, for networks that cannot be counted.

    An image takes three times the student's forward pass, as the backward pass is two of them (Kaplan et al., "Scaling
    Laws for Neural Language Models", 2020), and each teacher's forward pass once. Of a network that is frozen in part
    the backward pass counts by the share of the parameters that are trained. What activation checkpointing
    computes again does not count. Matrix products, convolutions and attention are counted; the involution itself, which
    is small beside the convolutions around it, is not.
    """
    config = prepared.config
    peak = peak_flops(device_name, decided(config.engine.precision))
    if peak is None:
        return None
    size = config.data.image_size
    try:
        student, teachers = prepared.build_on_meta()
        trained = sum(parameter.numel() for parameter in student.parameters())
        frozen = sum(tensor.numel() for name, tensor in student.named_buffers() if name in student.frozen)
        passes = 1 + 2 * trained / (trained + frozen)
        per_image = passes * forward_flops(student, size) + sum(forward_flops(teacher, size) for teacher in teachers)
    except Exception as error:
        # A model of timm's may do what cannot be done without data. No figure in the log is worth a run.
        say(f"mfu is not logged, because the FLOPs of the networks cannot be counted: {one_line(error, MOST)}")
        return None
    return ModelFlops(per_image, peak * prepared.world.world_size)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Of one device, in FLOP/s."""
    for pattern, (with_tensor_cores, without) in PEAK_FLOPS.items():
        if re.search(pattern, device_name):
            return without if precision == "float32" else with_tensor_cores
    return None


def forward_flops(network: Network, image_size: int) -> int:
    """Floating-point operations of a forward pass over one image; a multiplication and an addition are two.

    network: on any device, meta too; nothing is computed.
    """
    # BatchNorm in training refuses a single value per channel: one image where the feature map is a single pixel.
    batch_size = 2
    # As plain matrix products: torch 2.11 does not count the fused attention that a CPU is given.
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), torch.no_grad(), plain_attention, FlopCounterMode(display=False) as counter:
        images = torch.empty(batch_size, 3, image_size, image_size)
        torch.func.functional_call(network, fake_state(network), (images,))
    return counter.get_total_flops() // batch_size
