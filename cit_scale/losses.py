"""The co-advising loss: soft labels for the class token, one divergence per teacher token.

Every term is a mean over the batch and a sum over classes, so equal micro-steps and ranks leave the loss where it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cit_scale.batch import LossTerms, StudentLogits, TeacherLogits


def soft_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean over B of -sum_k w_k targets log softmax(logits). logits, targets: (B, K), rows of targets sum to 1.

    class_weights: w, (K,); None: all 1. Not divided by the weights of the batch, as torch's cross_entropy divides: the
    loss of a global batch is the mean over its micro-batches, however it is cut.
    """
    weighted = targets if class_weights is None else targets * class_weights
    return -(weighted * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def balancing_weights(counts: Tensor, exponent: float) -> Tensor:
    """Weights of classes, (K,) float32, in proportion to their counts to the power -exponent, with mean 1 over samples.

    counts: (K,), samples of each class. A class without samples has weight 0.
    """
    counts = counts.double()
    weights = torch.where(counts > 0, counts.clamp(min=1) ** -exponent, 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def distillation_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over B. student, teacher: (B, K) logits.

    The factor T^2 keeps the gradient's size when T changes (Hinton, Vinyals, Dean: "Distilling the Knowledge in a
    Neural Network", 2015).
    """
    student_log_probs = F.log_softmax(student / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)


def co_advise_loss(
    student: StudentLogits,
    teacher: TeacherLogits,
    targets: Tensor,
    *,
    temperature: float,
    weights: Mapping[str, float],
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Label loss on the class token plus one weighted divergence per teacher (CiT, CVPR 2022, section 3).

    student: ``cls`` and a field for every field of teacher, each (B, K). targets: (B, K), rows sum to 1.
    weights: by teacher. class_weights: (K,), of the label loss.
    """
    label = soft_cross_entropy(student.cls, targets, class_weights)
    distillation = {
        name: distillation_divergence(getattr(student, name), logits, temperature)
        for name, logits in teacher._asdict().items()
    }
    total = label + sum(weights[name] * divergence for name, divergence in distillation.items())
    return LossTerms(total=total, label=label, distillation=distillation)
