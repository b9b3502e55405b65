import math

import pytest
import torch
import torch.nn.functional as F

from cit_scale.batch import student_logits_type, teacher_logits_type
from cit_scale.losses import balancing_weights, co_advise_loss, distillation_divergence, soft_cross_entropy


def test_cross_entropy_of_a_hand_worked_case():
    # softmax of (0, ln 3) is (1/4, 3/4)
    logits = torch.tensor([[0.0, math.log(3)]])
    targets = torch.tensor([[0.5, 0.5]])
    expected = -(0.5 * math.log(1 / 4) + 0.5 * math.log(3 / 4))
    assert soft_cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_of_hard_targets_is_torch_cross_entropy():
    logits = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3, 1])
    targets = torch.nn.functional.one_hot(labels, 7).double()
    torch.testing.assert_close(soft_cross_entropy(logits, targets), torch.nn.functional.cross_entropy(logits, labels))


def test_divergence_of_a_hand_worked_case_counts_from_teacher_to_student():
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    expected = 1 / 4 * math.log((1 / 4) / (1 / 2)) + 3 / 4 * math.log((3 / 4) / (1 / 2))
    assert distillation_divergence(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-12)


def test_divergence_is_zero_when_student_and_teacher_agree():
    logits = torch.randn(4, 9)
    assert distillation_divergence(logits, logits + 3.0, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_divergence_keeps_the_size_of_its_gradient_at_high_temperature():
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 9, dtype=torch.float64)
    norms = [
        torch.autograd.grad(distillation_divergence(student, teacher, t), student)[0].norm().item() for t in (50, 100)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_each_teacher_pulls_its_own_head_with_its_own_weight():
    student = student_logits_type(("conv", "inv"))(*(torch.randn(3, 5, requires_grad=True) for _ in range(3)))
    teacher = teacher_logits_type(("conv", "inv"))(torch.randn(3, 5), torch.randn(3, 5))
    targets = torch.softmax(torch.randn(3, 5), dim=-1)
    terms = co_advise_loss(student, teacher, targets, temperature=2.0, weights={"conv": 0.5, "inv": 3.0})
    torch.testing.assert_close(
        terms.total, terms.label + 0.5 * terms.distillation["conv"] + 3.0 * terms.distillation["inv"]
    )
    torch.testing.assert_close(terms.distillation["conv"], distillation_divergence(student.conv, teacher.conv, 2.0))
    torch.testing.assert_close(terms.distillation["inv"], distillation_divergence(student.inv, teacher.inv, 2.0))
    terms.distillation["inv"].backward(retain_graph=True)
    assert student.cls.grad is None
    assert student.conv.grad is None
    assert student.inv.grad.norm() > 0


def test_without_teachers_the_loss_is_the_label_term():
    student = student_logits_type(())(torch.randn(3, 5))
    targets = torch.softmax(torch.randn(3, 5), dim=-1)
    terms = co_advise_loss(student, teacher_logits_type(())(), targets, temperature=1.0, weights={})
    assert terms.total.item() == terms.label.item()
    assert terms.distillation == {}


def test_the_mean_over_micro_batches_is_the_loss_of_the_batch():
    logits, targets = torch.randn(8, 5, dtype=torch.float64), torch.softmax(torch.randn(8, 5).double(), dim=-1)
    halves = [soft_cross_entropy(logits[i : i + 4], targets[i : i + 4]) for i in (0, 4)]
    torch.testing.assert_close(sum(halves) / 2, soft_cross_entropy(logits, targets))


def test_class_weights_weigh_the_label_loss_and_have_mean_one_over_the_images():
    counts = torch.tensor([600, 300, 100, 0])
    for exponent, ratio in ((0.5, 6**0.5), (1.0, 6.0)):
        weights = balancing_weights(counts, exponent)
        assert (weights * counts).sum().item() == pytest.approx(1000, rel=1e-6)
        assert (weights[2] / weights[0]).item() == pytest.approx(ratio, rel=1e-5)
        assert weights[3] == 0
    logits, targets = torch.randn(6, 4), torch.eye(4)[torch.tensor([0, 1, 2, 0, 1, 2])]
    each = F.cross_entropy(logits, targets.argmax(1), weight=weights, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, targets, weights), each.mean())
    torch.testing.assert_close(soft_cross_entropy(logits, targets, torch.ones(4)), soft_cross_entropy(logits, targets))
