import math

import torch
import torch.nn.functional as F

from dfq.distill.losses import kd_divergence, multi_teacher_divergence


def test_kd_is_the_kullback_leibler_sum_over_classes():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    # at T = 2 the teacher says (3/4, 1/4), the student (1/2, 1/2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    torch.testing.assert_close(kd_divergence(student, teacher, 2.0), torch.tensor([expected]))


def test_kd_mean_is_batchmean():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    expected = F.kl_div(
        F.log_softmax(student / 3, 1), F.softmax(teacher / 3, 1), reduction="batchmean"
    )
    torch.testing.assert_close(kd_divergence(student, teacher, 3.0).mean(), 9 * expected)


def test_impossible_classes_do_not_change_kd():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    wide = [torch.cat([logits, torch.full((5, 93), -50.0)], 1) for logits in (student, teacher)]
    torch.testing.assert_close(kd_divergence(*wide, 1.0), kd_divergence(student, teacher, 1.0))


def test_equal_logits_diverge_by_nothing_and_pull_nowhere():
    teacher = torch.randn(4, 10)
    student = (teacher + 3.0).requires_grad_()  # logits matter up to a constant
    loss = kd_divergence(student, teacher, 4.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros(4, 10), atol=1e-5, rtol=0)


def test_a_column_a_teacher():
    student, teachers = torch.randn(5, 7), [torch.randn(5, 7) for _ in range(3)]
    table = multi_teacher_divergence(student, teachers, 2.0)
    assert table.shape == (5, 3)
    assert torch.equal(table[:, 1], kd_divergence(student, teachers[1], 2.0))
