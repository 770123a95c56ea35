from collections import Counter

import pytest
import torch
from torch import nn

from dfq.synthesize.bn_stats import capture_bn_statistics
from dfq.synthesize.teachers import (
    Renormalized,
    TeacherSampler,
    in_courses,
    renormalization,
    renormalized,
)
from dfq.types import DataSpec, InputError

PLAIN = DataSpec((2, 4, 4), 3)
OWN = DataSpec((2, 4, 4), 3, mean=(0.5, 0.25), std=(0.5, 0.125))
DATA = DataSpec((2, 4, 4), 3, mean=(0.4, 0.6), std=(0.2, 0.3))
A, B, C, D = (nn.Identity() for _ in range(4))


def _rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_teacher_sees_the_same_pixels_in_its_own_normalization():
    pixels = torch.rand(5, 2, 4, 4)
    mean, std = (torch.tensor(v)[:, None, None] for v in (DATA.mean, DATA.std))
    own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (OWN.mean, OWN.std))
    seen = renormalized(nn.Identity(), OWN, DATA)((pixels - mean) / std)
    torch.testing.assert_close(seen, (pixels - own_mean) / own_std)
    factor, offset = renormalization(PLAIN, OWN)  # pixels are in 0..1
    torch.testing.assert_close(pixels * factor + offset, (pixels - own_mean) / own_std)


def test_the_same_normalization_leaves_the_teacher_as_it_is():
    written_out = DataSpec((2, 4, 4), 3, mean=(0.0, 0.0), std=(1.0, 1.0))
    assert renormalized(A, written_out, PLAIN) is A
    assert renormalized(A, OWN, OWN) is A


def test_a_renormalized_teacher_stays_in_eval_mode_and_shows_its_statistics():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval()
    teacher = renormalized(model, OWN, DATA)
    assert isinstance(teacher, Renormalized)
    assert not any(module.training for module in teacher.modules())
    x = torch.randn(6, 2, 4, 4)
    with capture_bn_statistics(teacher) as stats:
        teacher(x)
    expected = model[0](x * teacher.factor + teacher.offset).mean((0, 2, 3))
    torch.testing.assert_close(stats.batch_mean[0], expected)


def test_each_batch_draws_one_teacher_from_each_of_some_courses():
    sampler = TeacherSampler([[A, B], [C], [D]], per_batch=2)
    drawn = Counter()
    for seed in range(300):
        teachers = sampler.draw(0, _rng(seed))
        assert len(teachers) == 2
        assert not {A, B} <= set(teachers)  # of one course
        drawn.update(map(id, teachers))
    shares = [drawn[id(teacher)] / 300 for teacher in (A, B, C, D)]
    for share, expected in zip(shares, (1 / 3, 1 / 3, 2 / 3, 2 / 3), strict=True):
        assert abs(share - expected) < 0.1


def test_few_courses_are_attended_all_in_their_order():
    sampler = TeacherSampler([[A], [B], [C]], per_batch=9)
    assert sampler.draw(0, _rng()) == [A, B, C]


@pytest.mark.parametrize(("mode", "most"), [("batch", 1), ("step", 4)])
def test_the_mode_says_whether_a_batch_keeps_its_teachers(mode, most):
    sampler = TeacherSampler([[A], [B], [C], [D]], per_batch=1, mode=mode)
    rng = _rng()
    seen = {sampler.draw(step, rng)[0] for step in range(40)}
    assert len(seen) == most
    assert len({sampler.draw(0, rng)[0] for _ in range(40)}) == 4  # a new batch draws anew


def test_courses_are_cut_in_order_and_must_hold_all():
    assert in_courses([A, B, C], (2, 1)) == [[A, B], [C]]
    assert in_courses([A, B, C], ()) == [[A], [B], [C]]
    for sizes in ((2,), (2, 2), (3, 0)):
        with pytest.raises(InputError, match="add up"):
            in_courses([A, B, C], sizes)


def test_a_sampler_without_teachers_is_refused():
    for courses in ([], [[A], []]):
        with pytest.raises(InputError, match="course"):
            TeacherSampler(courses)
    with pytest.raises(InputError, match="per_batch"):
        TeacherSampler([[A]], per_batch=0)
