import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfq.distill.losses import kd_divergence
from dfq.distill.reconstruct import ReconstructionConfig
from dfq.methods import GENIEConfig, genie
from dfq.methods.blockwise import float_twin
from dfq.methods.genie import GENIE_EFFORTS, genie_images
from dfq.prepare import QConv2d, QLinear, Quantizer, calibrate, prepare
from dfq.prepare.adds import QAdd
from dfq.synthesize.latents import LatentConfig
from dfq.types import DataSpec, Images, InputError

DATA = DataSpec(shape=(3, 8, 8), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)
TINY = GENIEConfig(
    LatentConfig(batch_size=16, batches=2, steps=4, first_steps=0, latent_dim=8),
    ReconstructionConfig(steps=6, batch_size=8),
)


class Block(nn.Module):
    """A residual block that halves the map."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + x[:, :, ::2, ::2])


class Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.mean() > -100 else x


def _teacher(kind=nn.Sequential):
    torch.manual_seed(1)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block()]
    model = kind(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[-1].weight.data *= 30  # logits far enough apart that low bits hurt
    return model.eval().requires_grad_(False)


def _train(config=TINY, seed=0, bits="w3a3", kind=nn.Sequential, given=None, **options):
    teacher, lines = _teacher(kind), []
    student = prepare(teacher, bits, data=DATA, **options)
    student, images = genie(
        teacher,
        student,
        DATA,
        config,
        given=given,
        rng=torch.Generator().manual_seed(seed),
        report=lambda stage, step, steps, **v: lines.append((stage, step, steps, v)),
    )
    return teacher, student, images, lines


def _change(part, **changes):
    return replace(TINY, **{part: replace(getattr(TINY, part), **changes)})


def _layers(student):
    return [m for m in student.modules() if isinstance(m, QConv2d | QLinear)]


def _same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_it_trains_the_student_and_leaves_the_teacher_alone():
    teacher, student, images, _ = _train()
    assert _same(teacher, _teacher())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert torch.equal(student.get_submodule("1").running_mean, teacher[1].running_mean)
    assert torch.equal(student.get_submodule("1").weight, teacher[1].weight)
    assert images.images.shape == (32, 3, 8, 8)
    assert images.labels.shape == (32,)


@pytest.mark.parametrize("protocol", ["brecq", "gdfq"])
@pytest.mark.parametrize("bits", ["w4a4", "w2a2"])
def test_the_result_is_an_ordinary_student_with_weights_on_their_grids(bits, protocol):
    _, student, images, _ = _train(bits=bits, protocol=protocol)
    for layer in _layers(student):
        assert type(layer.weight_quantizer) is Quantizer
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(m.drop == 0 for m in student.modules() if isinstance(m, Quantizer))
    again = prepare(_teacher(), bits, data=DATA, protocol=protocol)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(images.images), student(images.images))


def test_every_layer_is_rounded_otherwise_than_to_nearest_and_every_scale_moves():
    _, student, images, _ = _train(_change("reconstruction", steps=40, lr=0.1))
    nearest = prepare(_teacher(), "w3a3", data=DATA)
    calibrate(nearest, images.images)
    for layer, start in zip(_layers(student), _layers(nearest), strict=True):
        codes, before = (m.weight_quantizer.codes(m.weight) for m in (layer, start))
        assert not torch.equal(codes, before)
        assert (codes.int() - before.int()).abs().max() == 1
        for which in ("weight_quantizer", "input_quantizer"):
            moved, still = getattr(layer, which), getattr(start, which)
            assert torch.equal(moved.log_scale, still.log_scale) == (moved.mode == "fixed")


def test_the_scale_of_a_residual_sum_learns_too():
    _, student, images, _ = _train(_change("reconstruction", steps=40))
    nearest = prepare(_teacher(), "w3a3", data=DATA)
    calibrate(nearest, images.images)
    sums = [
        [m.quantizer.scale for m in s.modules() if isinstance(m, QAdd)] for s in (student, nearest)
    ]
    assert len(sums[0]) == 1
    assert not torch.equal(sums[0][0], sums[1][0])


def test_same_seed_gives_the_same_student_and_another_seed_another():
    state = torch.random.get_rng_state()
    first = _train()
    torch.manual_seed(1)
    torch.random.set_rng_state(state)
    second, other = _train(), _train(seed=1)
    assert _same(first[1], second[1])
    assert torch.equal(first[2].images, second[2].images)
    assert not _same(first[1], other[1])


def test_it_tells_every_step_of_both_stages():
    *_, lines = _train()
    assert [line[0] for line in lines] == ["synthesize"] * 8 + ["reconstruct"] * 18
    told = [(step, steps) for stage, step, steps, _ in lines if stage == "reconstruct"]
    assert told == [(step, 18) for step in range(1, 19)]  # stem, block, classifier


def test_given_images_are_learned_from_instead():
    given = Images(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.int64))
    _, student, images, lines = _train(given=given)
    assert {line[0] for line in lines} == {"reconstruct"}
    assert images is given
    assert not _same(student, _train()[1])


def test_it_distills_as_many_images_as_asked_for():
    rng = torch.Generator().manual_seed(0)
    images = genie_images(_teacher(), DATA, TINY, count=37, rng=rng)
    assert len(images.images) == len(images.labels) == 37
    assert torch.equal(images.images[:16], _train()[2].images[:16])


def test_it_comes_nearer_to_the_teacher_than_nearest_rounding():
    config = GENIEConfig(
        replace(TINY.latents, batch_size=64, steps=30),
        replace(TINY.reconstruction, steps=150, batch_size=16),
    )
    teacher, student, images, lines = _train(config, bits="w2a4")
    nearest = prepare(teacher, "w2a4", data=DATA)
    calibrate(nearest, images.images)
    fresh = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        divergence = [kd_divergence(m(fresh), teacher(fresh), 1.0) for m in (student, nearest)]
    assert divergence[0].mean() < 0.7 * divergence[1].mean()
    errors = [float(v["error"]) for stage, *_, v in lines if stage == "reconstruct"]
    block = errors[150:300]
    assert sum(block[-20:]) < 0.8 * sum(block[:20])


def test_swing_changes_the_images():
    images = [_train(_change("latents", swing=swing))[2].images for swing in (True, False)]
    assert not torch.equal(*images)


@pytest.mark.parametrize("change", [{"drop": 0.0}, {"rounding_weight": 0.0}, {"lr": 0.0}])
def test_every_idea_of_the_reconstruction_changes_the_student(change):
    config = _change("reconstruction", steps=40, lr=0.05)
    other = replace(config, reconstruction=replace(config.reconstruction, **change))
    assert not _same(_train(config)[1], _train(other)[1])


def test_a_model_that_cannot_be_traced_is_reconstructed_layer_by_layer(caplog):
    with caplog.at_level(logging.WARNING, "dfq"):
        _, student, _, lines = _train(kind=Untraceable)
    assert "cannot be traced" in caplog.text
    assert lines[-1][1:3] == (24, 24)  # four layers
    for layer in _layers(student):
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


@pytest.mark.parametrize("effort", GENIE_EFFORTS)
def test_every_effort_runs(effort):
    config = GENIE_EFFORTS[effort]
    latents = replace(config.latents, batch_size=8, batches=2, steps=2, first_steps=1)
    short = GENIEConfig(latents, replace(config.reconstruction, steps=2))
    assert all(p.isfinite().all() for p in _train(short)[1].parameters())


def test_scales_that_are_not_learned_are_refused_before_any_work():
    with pytest.raises(InputError, match="scales"):
        _train(scales="minmax")


def test_the_float_twin_is_the_teacher_whatever_becomes_of_the_student():
    teacher = _teacher()
    student = prepare(teacher, "w2a2", data=DATA)
    twin, x = float_twin(student), torch.randn(4, 3, 8, 8)
    student.get_submodule("0").weight.data.zero_()
    torch.testing.assert_close(twin(x), teacher(x))
