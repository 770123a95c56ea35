import torch
from torch import nn

from dfq.prepare import calibrate, prepare
from dfq.prepare.means import channel_means, correct_means
from dfq.prepare.sensitivity import quantizing_only
from dfq.prepare.squant import balance_rounding
from dfq.types import DataSpec

DATA = DataSpec((3, 8, 8), classes=5)
IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """One BatchNorm runs twice, one has no bias, one is fused with its ReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.fused, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.mid, self.plain = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.point, self.bare = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.again, self.twice = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.plain(self.mid(self.relu(self.fused(self.stem(x)))))
        x = self.bare(self.point(x.relu()))
        x = self.twice(self.again(self.twice(x)))
        return self.head(self.last(x).mean((2, 3)))


def _student(bits="w3a3"):
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        for _ in range(20):
            model.train()(IMAGES)
        for norm in (model.fused, model.plain, model.twice, model.last):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    student = prepare(model.eval(), bits, data=DATA)
    calibrate(student, IMAGES)
    return student


def _means(student, name):
    """Of what the BatchNorm puts out, before its ReLU: quantized, and without quantizers."""
    seen, norm = [], student.get_submodule(name)

    def note(module, args):
        y = nn.functional.batch_norm(
            args[0], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        seen.append(y.mean((0, 2, 3)))

    handle = norm.register_forward_pre_hook(note)
    with torch.no_grad():
        student.eval()(IMAGES)
        with quantizing_only(student, None):
            student(IMAGES)
    handle.remove()
    return seen


def _correct(student):
    """Behind weights rounded by ``balance_rounding``; return how many means there were."""
    wanted = channel_means(student, IMAGES)
    balance_rounding(student)
    correct_means(student, IMAGES, wanted)
    return len(wanted)


def test_behind_each_batch_norm_the_means_are_those_without_quantizers():
    student, rounded, untouched = _student(), _student(), _student()
    balance_rounding(rounded)
    names = ("fused", "plain", "last")
    wanted = {name: _means(untouched, name)[1] for name in names}
    assert _correct(student) == len(names)
    for name in names:
        torch.testing.assert_close(_means(student, name)[0], wanted[name], rtol=1e-4, atol=1e-5)
        assert (_means(rounded, name)[0] - wanted[name]).abs().max() > 0.01


def test_nothing_but_biases_changes_and_none_of_what_runs_twice():
    student, before = _student(), _student()
    balance_rounding(before)
    _correct(student)
    changed = {
        name
        for (name, new), old in zip(student.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert changed == {"fused.bias", "plain.bias", "last.bias"}


def test_a_student_in_training_stays_in_training_and_without_hooks():
    student = _student().train()
    hooks = [dict(module._forward_pre_hooks) for module in student.modules()]
    _correct(student)
    assert student.training
    assert [dict(module._forward_pre_hooks) for module in student.modules()] == hooks


def test_a_model_without_batch_norm_stays_as_it_is():
    student = prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "w8a8", data=DATA)
    calibrate(student, IMAGES)
    assert _correct(student) == 0
