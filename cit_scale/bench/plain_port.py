"""A plain port of the paper's training step, to time ours against: what one writes from the paper with timm and torch.

Eager, float32, NCHW. The involution goes through unfold, with a buffer of patches. The teachers keep their BatchNorms
and run under no_grad. Mixup or cutmix takes the whole batch. AdamW is PyTorch's by default, and the loss is read in
each step, to stop where it is not finite. Attention is timm's, by PyTorch's fused kernel, which the code of 2022 had
not.

The networks are ours, with the same weights, so both steps compute the same function (tests/test_bench_step.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cit_scale.batch import StudentLogits
from cit_scale.bench.involution import unfold
from cit_scale.models.involution import Involution2d
from cit_scale.models.network import Network

LR, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.05, 15.0
MIXUP_ALPHA, CUTMIX_ALPHA, SMOOTHING = 0.8, 1.0, 0.1

Box = tuple[slice, slice]


class InvolutionOverUnfold(nn.Module):
    """The involution as the paper's formula has it: patches times kernel, summed over the K x K taps."""

    def __init__(self, ours: Involution2d) -> None:
        super().__init__()
        self.groups, self.kernel_size, self.stride = ours.groups, ours.kernel_size, ours.stride
        self.pool, self.reduce, self.bn, self.span = ours.pool, ours.reduce, ours.bn, ours.span

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.reduce(self.pool(x))))
        kernel = F.conv2d(features, self.span.weight, self.span.bias)  # (B, G*K*K, H', W')
        kernel = kernel.unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return unfold(x, kernel, self.stride)


def plain(network: Network, device: torch.device) -> Network:
    """The network, in place, on the device and with its involutions over unfold."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Involution2d):
                setattr(module, name, InvolutionOverUnfold(child))
    return network.to(device)


def normalised(network: Network, images: Tensor) -> Tensor:
    """Without the change to channels last that ``Network.forward`` makes."""
    return (images - network.mean) / network.std


def plain_teacher(network: Network, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A teacher's logits, (B, K), for images (B, 3, H, W) of the size that it takes."""
    network = plain(network, device).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(images: Tensor) -> Tensor:
        return network.model(normalised(network, images))

    return forward


def draw_mix(random: np.random.Generator, size: int) -> tuple[float, Box | None]:
    """Lambda of mixup, or lambda and box of cutmix, with even odds. size: of the images, in pixels."""
    if random.random() < 0.5:
        return random.beta(MIXUP_ALPHA, MIXUP_ALPHA), None
    cut = int(size * math.sqrt(1 - random.beta(CUTMIX_ALPHA, CUTMIX_ALPHA)))
    y, x = random.integers(size, size=2).tolist()
    rows, columns = (slice(max(each - cut // 2, 0), min(each + cut // 2, size)) for each in (y, x))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return 1 - area / size**2, (rows, columns)


def mix(images: Tensor, labels: Tensor, num_classes: int, lam: float, box: Box | None) -> tuple[Tensor, Tensor]:
    """Mix each image with that of the reversed batch. Returns images (B, 3, H, W) and targets (B, K)."""
    one_hot = F.one_hot(labels, num_classes).float()
    targets = one_hot * (1 - SMOOTHING) + SMOOTHING / num_classes
    if box is None:
        mixed = images * lam + images.flip(0) * (1 - lam)
    else:
        mixed = images.clone()
        mixed[:, :, *box] = images.flip(0)[:, :, *box]
    return mixed, targets * lam + targets.flip(0) * (1 - lam)


def loss_of(student: StudentLogits, teachers: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets for the class token, and a KL divergence for each teacher's."""
    loss = -(targets * F.log_softmax(student.cls, dim=1)).sum(dim=1).mean()
    for name, logits in teachers.items():
        theirs, ours = F.log_softmax(logits, dim=1), F.log_softmax(getattr(student, name), dim=1)
        loss = loss + F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return loss


class PlainPort:
    """The student, the teachers by name and the optimizer. One call of ``step`` is one update."""

    def __init__(
        self,
        student: Network,
        teachers: Mapping[str, Callable[[Tensor], Tensor]],
        num_classes: int,
        device: torch.device,
    ) -> None:
        self.student = plain(student, device).train()
        self.teachers = teachers
        self._num_classes = num_classes
        self._random = np.random.default_rng(0)
        exempt = self.student.no_weight_decay()
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.student.named_parameters():
            parts[parameter.ndim <= 1 or name in exempt].append(parameter)
        groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (WEIGHT_DECAY, 0), strict=True)]
        self._optimizer = torch.optim.AdamW(groups, lr=LR)

    def forward(self, images: Tensor) -> StudentLogits:
        """images: (B, 3, H, W) in [0, 1]. Returns the logits of every head."""
        model: nn.Module = self.student.model
        return model.forward_heads(normalised(self.student, images))  # type: ignore[operator]

    def loss(self, images: Tensor, targets: Tensor, mark: Callable[[str], None] = lambda part: None) -> Tensor:
        """The loss of a mixed batch. mark: told which part of the step begins."""
        mark("teachers")
        teacher_logits = {name: teacher(images) for name, teacher in self.teachers.items()}
        mark("student")
        student_logits = self.forward(images)
        mark("loss")
        return loss_of(student_logits, teacher_logits, targets)

    def step(self, images: Tensor, labels: Tensor, mark: Callable[[str], None] = lambda part: None) -> float:
        """images: (B, 3, H, W) in [0, 1]. labels: (B,). Returns the loss."""
        mark("mix")
        mixed, targets = mix(images, labels, self._num_classes, *draw_mix(self._random, images.shape[-1]))
        loss = self.loss(mixed, targets, mark)
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss of the plain port is {value}")
        mark("backward")
        self._optimizer.zero_grad()
        loss.backward()
        mark("update")
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_NORM)
        self._optimizer.step()
        return value
