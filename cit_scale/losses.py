"""The co-advising loss: soft labels for the class token, one divergence per teacher token.

Every term is a mean over the batch and a sum over classes, so equal micro-steps and ranks leave the loss where it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from cit_scale.batch import LossTerms, StudentLogits, TeacherLogits


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over B of -sum_k targets log softmax(logits). logits, targets: (B, K), rows of targets sum to 1."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


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
) -> LossTerms:
    """Label loss on the class token plus one weighted divergence per teacher (CiT, CVPR 2022, section 3).

    student: ``cls`` and a field for every field of teacher, each (B, K). targets: (B, K), rows sum to 1.
    weights: by teacher.
    """
    label = soft_cross_entropy(student.cls, targets)
    distillation = {
        name: distillation_divergence(getattr(student, name), logits, temperature)
        for name, logits in teacher._asdict().items()
    }
    total = label + sum(weights[name] * divergence for name, divergence in distillation.items())
    return LossTerms(total=total, label=label, distillation=distillation)
