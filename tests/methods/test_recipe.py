import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from dfq.distill.features import capture_features, feature_distance
from dfq.distill.student import StudentConfig
from dfq.methods import RecipeConfig, recipe, recipe_images
from dfq.methods.recipe import fewest_bits
from dfq.methods.recipe_config import RECIPE_EFFORTS
from dfq.prepare import calibrate, prepare
from dfq.prepare.equalize import equalize_channels
from dfq.prepare.gptq import compensate_rounding
from dfq.prepare.means import channel_means, correct_means
from dfq.prepare.sizes import size_channels
from dfq.synthesize.contrast import add_contrast
from dfq.synthesize.inversion import InversionConfig
from dfq.types import DataSpec, Images, InputError
from tests.methods.test_genie import DATA, TINY
from tests.methods.test_genie import _teacher as residual
from tests.methods.test_methods import _teacher as plain

recipe_module = sys.modules["dfq.methods.recipe"]  # its name in the package is the function's
CONFIG = RecipeConfig(
    TINY.latents,
    InversionConfig(batch_size=16, batches=1, steps=3),
    TINY.reconstruction,
    StudentConfig(lr=1e-3),
    distill_steps=5,
    distill_batch=8,
)


def _train(bits, config=CONFIG, seed=0, given=None, teacher=residual, teachers=(), **options):
    teacher, stages = teacher(), []
    student = prepare(teacher, bits, data=DATA, **options)
    student, images = recipe(
        teacher,
        student,
        DATA,
        config,
        teachers=teachers,
        given=given,
        rng=torch.Generator().manual_seed(seed),
        report=lambda stage, step, steps, **values: stages.append((stage, steps)),
    )
    return teacher, student, images, dict(stages)


def _make(data=DATA, config=CONFIG, count=None):
    rng = torch.Generator().manual_seed(0)
    return recipe_images(residual(), data, config, count=count, rng=rng).images


def test_it_counts_the_steps_of_both_kinds_of_images_through():
    seen = []
    recipe_images(
        residual(),
        DATA,
        CONFIG,
        rng=torch.Generator().manual_seed(0),
        report=lambda stage, step, steps, **values: seen.append((stage, step, steps)),
    )
    total = 2 * 4 + 1 * 3  # batches times steps
    assert seen == [("synthesize", step, total) for step in range(1, total + 1)]


def _given(side):
    images = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(5))
    return Images(images, torch.zeros(16).long())


def _same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    ("teacher", "bits", "stages"),
    [
        (residual, "w8a8", ["synthesize", "distill"]),
        (residual, "w8a6", ["synthesize", "reconstruct", "distill"]),
        (residual, "w2a2", ["synthesize", "reconstruct", "distill"]),
        (plain, "w8a8", ["synthesize", "distill"]),
        (plain, "w2a2", ["synthesize", "reconstruct", "distill"]),
    ],
)
def test_bits_decide_which_parts_run(teacher, bits, stages):
    assert list(_train(bits, teacher=teacher)[3]) == stages


def test_below_four_bits_blocks_and_student_learn_for_twice_as_long():
    four, three = _train("w4a4")[3], _train("w4a3")[3]
    assert four["distill"] == CONFIG.distill_steps
    for stage, factor in (("synthesize", 1), ("reconstruct", 2), ("distill", 2)):
        assert three[stage] == factor * four[stage]


def test_what_counts_as_low_bits_can_be_chosen():
    longer = replace(CONFIG.reconstruction, steps=2 * CONFIG.reconstruction.steps)
    long = replace(CONFIG, reconstruction=longer, distill_steps=10, low_bits=2)
    assert _same(_train("w3a3")[1], _train("w3a3", long)[1])
    assert not _same(_train("w4a4")[1], _train("w4a4", long)[1])


def test_edges_with_fewer_bits_count_too():
    assert fewest_bits(prepare(residual(), "w8a8", data=DATA, edge_bits=3)) == 3


class Depthwise(nn.Sequential):
    """Channels of very different sizes on their way into a depthwise layer."""

    def __init__(self):
        wide = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        deep = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()]
        super().__init__(*wide, *deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def _depthwise():
    torch.manual_seed(1)
    model = Depthwise().eval().requires_grad_(False)
    model[1].weight.copy_(torch.linspace(0.1, 3.0, 8))
    return model


def test_with_many_bits_channels_are_sized_weights_rounded_and_means_put_right():
    config = replace(CONFIG, distill_steps=0)
    teacher, student, images, _ = _train("w8a8", config, teacher=_depthwise)
    expected = prepare(teacher, "w8a8", data=DATA)
    seen = add_contrast(images, DATA, CONFIG.contrast).images
    assert equalize_channels(expected, images.images) == 1
    assert size_channels(expected, seen) == 16
    calibrate(expected, seen)
    means = channel_means(expected, images.images)
    compensate_rounding(expected, images.images)
    assert not _same(student, expected)
    correct_means(expected, images.images, means)
    assert len(means) == 2
    assert _same(student, expected)


@pytest.mark.parametrize(("bits", "steps", "same"), [("w8a8", 0, False), ("w4a4", 5, True)])
def test_with_many_bits_grids_hold_images_of_more_contrast(bits, steps, same):
    given, seen = _given(8), []
    for contrast in (1.5, 1.0):
        config = replace(CONFIG, distill_steps=steps, contrast=contrast)
        _, student, images, _ = _train(bits, config, given=given)
        assert images is given
        seen.append(student)
    assert _same(*seen) is same


def test_with_many_bits_the_student_learns_from_images_of_more_contrast(monkeypatch):
    shown = []

    def keep(teacher, student, images, *rest):
        shown.append(images.images)

    monkeypatch.setattr(recipe_module, "_distill", keep)
    given = _given(8)
    _train("w8a8", given=given)
    _train("w4a4", given=given)
    many, few = shown
    assert torch.equal(many, add_contrast(given, DATA, 1.5).images)
    assert torch.equal(few, given.images)


@pytest.mark.parametrize(("bits", "sized"), [("w8a8", True), ("w7a8", True), ("w4a8", False)])
def test_with_many_bits_alone_channels_of_dense_layers_are_sized(bits, sized):
    config = replace(CONFIG, distill_steps=0)
    teacher, student, images, _ = _train(bits, config, teacher=plain)
    expected = prepare(teacher, bits, data=DATA)
    assert size_channels(expected, add_contrast(images, DATA, CONFIG.contrast).images) > 0
    assert not torch.equal(expected[1].weight, teacher[1].weight)
    assert torch.equal(student[1].weight, (expected if sized else teacher)[1].weight)


def test_with_few_bits_channels_are_equalized_too():
    config = replace(CONFIG, distill_steps=0)
    teacher, student, images, _ = _train("w4a4", config, teacher=_depthwise)
    expected = prepare(teacher, "w4a4", data=DATA)
    equalize_channels(expected, images.images)
    assert torch.equal(student[1].weight, expected[1].weight)
    assert not torch.equal(student[1].weight, teacher[1].weight)


def test_distilling_goes_on_from_the_reconstruction_and_brings_the_student_nearer():
    config = replace(CONFIG, distill_steps=150, distill_batch=16)
    teacher, student, images, _ = _train("w4a4", config, teacher=plain)
    _, rounded, same, stages = _train("w4a4", replace(config, distill_steps=0), teacher=plain)
    assert list(stages) == ["synthesize", "reconstruct"]  # distilling can be left out
    assert torch.equal(images.images, same.images)
    layers = ["0", "3", "7"]
    distances = []
    with torch.no_grad(), capture_features(teacher, layers) as wanted:
        teacher(images.images)
        for model in (student, rounded):
            with capture_features(model, layers) as shown:
                model(images.images)
            distances.append(feature_distance(shown, wanted, layers))
    # in the middle as at the end; the first layer has 8 bits and next to no error
    assert (distances[0][1:] < 0.9 * distances[1][1:]).all()


def test_given_images_are_learned_from_and_a_seed_decides_the_student():
    generator = torch.Generator().manual_seed(5)
    given = Images(torch.randn(16, *DATA.shape, generator=generator), torch.zeros(16).long())
    _, student, images, stages = _train("w3a3", given=given)
    assert images is given
    assert "synthesize" not in stages
    assert _same(student, _train("w3a3", given=given)[1])
    assert not _same(student, _train("w3a3", given=given, seed=1)[1])


def test_small_images_are_distilled_and_inverted_and_large_ones_only_inverted():
    def without(part):
        return replace(CONFIG, **{part: replace(getattr(CONFIG, part), batches=0)})

    both = _make()
    assert both.shape[0] == 32 + 16  # two batches of one kind, one of the other
    assert CONFIG.image_count(DATA) == 48
    assert torch.equal(both[:32], _make(config=without("inversion")))
    large = DataSpec((3, 72, 72), 4, DATA.mean, DATA.std)
    inverted = _make(large)
    assert len(inverted) == CONFIG.image_count(large) == 16
    assert torch.equal(inverted, _make(large, without("latents")))
    assert len(_make(large, count=20)) == 20


@pytest.mark.parametrize(("side", "share"), [(32, "mixed"), (72, "large_mixed")])
def test_small_images_are_inverted_with_boxes_in_them_and_large_ones_without(side, share):
    data = DataSpec((3, side, side), 4, DATA.mean, DATA.std)
    alone = replace(CONFIG, latents=replace(CONFIG.latents, batches=0))

    def made(mixed, large_mixed):
        inversion = replace(alone.inversion, mixed=mixed)
        return _make(data, replace(alone, inversion=inversion, large_mixed=large_mixed))

    unmoved = made(0.0, 0.0).equal(made(1.0, 0.0)), made(0.0, 0.0).equal(made(0.0, 1.0))
    assert unmoved == ((False, True) if share == "mixed" else (True, False))
    assert CONFIG.inversion.mixed > CONFIG.large_mixed == 0


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_it_makes_as_many_images_as_asked_for(count):
    assert len(_make(count=count)) == count


def test_further_teachers_change_the_inverted_images():
    alone, along = _train("w8a8")[2].images, _train("w8a8", teachers=(plain(),))[2].images
    assert torch.equal(alone[:32], along[:32])
    assert not torch.equal(alone[32:], along[32:])


def test_the_teacher_stays_and_every_effort_has_its_numbers():
    assert _same(_train("w3a3")[0], residual())
    steps = [RECIPE_EFFORTS[effort].distill_steps for effort in ("quick", "default", "full")]
    assert steps == sorted(set(steps))


def test_mirror_images_change_what_blocks_learn():
    assert not _same(_train("w4a4")[1], _train("w4a4", replace(CONFIG, mirror=False))[1])


@pytest.mark.parametrize(
    ("bits", "side", "changes", "same"),
    [
        ("w4a4", 72, {"distill_steps": 0}, False),  # blocks learn from parts
        ("w4a4", 72, {"mirror": False}, False),  # the student does
        ("w4a4", 64, {}, True),
        ("w8a8", 72, {}, True),
    ],
)
def test_with_few_bits_parts_of_large_images_are_learned_from(bits, side, changes, same):
    given = _given(side)
    parts = replace(CONFIG, **changes)
    whole = replace(parts, least_area=1.0)
    students = [_train(bits, config, given=given)[1] for config in (parts, whole)]
    assert _same(*students) is same


def test_a_part_that_is_none_is_refused_before_images_are_made():
    with pytest.raises(InputError, match="least_area must be above 0"):
        replace(CONFIG, least_area=0.0)


@pytest.mark.parametrize("name", ["distill_batch", "large_batch", "large_steps"])
def test_steps_without_images_are_refused_before_images_are_made(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        replace(CONFIG, **{name: 0})


@pytest.mark.parametrize(("side", "times", "batch"), [(64, 1, 8), (72, 4, 4)])
def test_large_images_are_learned_from_in_more_and_smaller_steps(side, times, batch):
    seen = []
    teacher = residual()
    teacher.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    config = replace(CONFIG, large_batch=4)
    stages = _train("w4a4", config, given=_given(side), teacher=lambda: teacher)[3]
    assert stages["distill"] == times * CONFIG.distill_steps
    assert seen[-1] == batch
    once = _train("w4a4", replace(CONFIG, large_steps=1), given=_given(side))[3]
    assert stages["reconstruct"] == times * once["reconstruct"]


@pytest.mark.parametrize(
    ("bits", "side", "own"),
    [
        ("w4a4", 64, "student"),
        ("w4a4", 72, "large_lr"),
        ("w8a8", 72, "many_lr"),
    ],
)
def test_behind_blocks_a_student_learns_at_the_rate_for_its_bits_and_images(bits, side, own):
    rates = {"large_lr": 1e-3, "many_lr": 1e-3, "student": StudentConfig(lr=1e-3)}
    first = _train(bits, replace(CONFIG, **rates), given=_given(side))[1]
    for name in rates:
        faster = StudentConfig(lr=1e-2) if name == "student" else 1e-2
        config = replace(CONFIG, **rates | {name: faster})
        assert _same(first, _train(bits, config, given=_given(side))[1]) is (name != own)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_depthwise_layers_keep_what_they_learned_before(bits):
    """Their weights, their scales; the student can be trained further all the same."""
    before, after = (
        _train(bits, replace(CONFIG, distill_steps=steps), teacher=_depthwise)[1]
        for steps in (0, CONFIG.distill_steps)
    )
    assert _same(before[3], after[3])
    for layer in (0, 1, 4):
        assert not torch.equal(before[layer].weight, after[layer].weight)
    assert all(parameter.requires_grad for parameter in after.parameters())


def test_scales_must_be_learned():
    with pytest.raises(InputError, match="use scales learned"):
        _train("w4a4", scales="minmax")
