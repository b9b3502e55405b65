import pytest
import torch

from cit_scale.batch import Batch, student_logits_type
from cit_scale.distributed.world import World
from cit_scale.evaluate import evaluate


def batch(labels, positions):
    count = len(labels)
    return Batch(
        images=torch.arange(count).float().view(count, 1, 1, 1).expand(count, 3, 2, 2),
        labels=torch.tensor(labels),
        positions=torch.tensor(positions),
        samples=torch.tensor(positions),
    )


def one_hot_logits(classes, count=7):
    return 10.0 * torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_accuracy_counts_each_head_and_their_average():
    logits = student_logits_type(("conv",))(one_hot_logits([0, 1, 2, 3]), 3 * one_hot_logits([0, 1, 6, 6]))
    accuracy = evaluate(lambda images: logits, [batch([0, 1, 2, 3], [0, 1, 2, 3])], World())
    assert accuracy.images == 4
    assert accuracy.top1 == {"cls": 100.0, "conv": 50.0, "average": 50.0}


def test_padding_does_not_count():
    logits = student_logits_type(())(one_hot_logits([0, 1, 2]))
    accuracy = evaluate(lambda images: logits, [batch([0, 5, 2], [0, 1, -1])], World())
    assert accuracy.images == 2
    assert accuracy.top1 == {"cls": 50.0}


def test_top5_finds_the_fifth_and_not_the_sixth():
    ranked = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).expand(2, 7)
    logits = student_logits_type(())(ranked)
    accuracy = evaluate(lambda images: logits, [batch([4, 5], [0, 1])], World())
    assert accuracy.top5 == {"cls": 50.0}


def test_fewer_than_five_classes_make_every_answer_a_top5_hit():
    logits = student_logits_type(())(one_hot_logits([0, 1], count=3))
    assert evaluate(lambda images: logits, [batch([2, 2], [0, 1])], World()).top5 == {"cls": 100.0}


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(lambda images: None, [], World())


def test_the_mean_over_classes_weighs_a_rare_class_like_any_other():
    logits = student_logits_type(())(one_hot_logits([0, 0, 0, 1, 3]))
    accuracy = evaluate(lambda images: logits, [batch([0, 0, 0, 0, 3], [0, 1, 2, 3, 4])], World())
    assert accuracy.top1 == {"cls": 80.0}
    assert accuracy.class_mean == {"cls": pytest.approx((75.0 + 100.0) / 2)}
