from dataclasses import replace

import pytest
import torch

from dfq.distill.losses import kd_divergence
from dfq.distill.student import StudentConfig
from dfq.methods import RecipeConfig, recipe
from dfq.methods.recipe import RECIPE_EFFORTS, fewest_bits
from dfq.prepare import calibrate, prepare
from dfq.prepare.squant import balance_rounding
from dfq.types import Images, InputError
from tests.methods.test_genie import DATA, TINY, _teacher

CONFIG = RecipeConfig(
    TINY.latents, TINY.reconstruction, StudentConfig(lr=1e-3), distill_steps=5, distill_batch=8
)


def _train(bits, config=CONFIG, seed=0, given=None, **options):
    teacher, stages = _teacher(), []
    student = prepare(teacher, bits, data=DATA, **options)
    student, images = recipe(
        teacher,
        student,
        DATA,
        config,
        given=given,
        rng=torch.Generator().manual_seed(seed),
        report=lambda stage, step, steps, **values: stages.append(stage),
    )
    return teacher, student, images, list(dict.fromkeys(stages))


def _same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    ("bits", "stages"),
    [
        ("w8a8", ["synthesize"]),
        ("w8a6", ["synthesize", "reconstruct"]),
        ("w4a4", ["synthesize", "reconstruct"]),
        ("w3a8", ["synthesize", "reconstruct", "distill"]),
        ("w4a2", ["synthesize", "reconstruct", "distill"]),
    ],
)
def test_the_fewest_bits_decide_which_parts_run(bits, stages):
    assert _train(bits)[3] == stages


def test_edges_with_fewer_bits_count_too():
    assert fewest_bits(prepare(_teacher(), "w8a8", data=DATA, edge_bits=3)) == 3


def test_many_bits_are_rounded_so_that_errors_cancel():
    teacher, student, images, _ = _train("w8a8")
    expected = prepare(teacher, "w8a8", data=DATA)
    calibrate(expected, images.images)
    assert not _same(student, expected)
    balance_rounding(expected)
    assert _same(student, expected)


def test_distilling_goes_on_from_the_reconstruction_and_brings_the_student_nearer():
    config = replace(CONFIG, distill_steps=150, distill_batch=16)
    teacher, student, images, _ = _train("w2a2", config)
    _, warm, same, _ = _train("w2a2", replace(config, distill_below=2))
    assert torch.equal(images.images, same.images)
    with torch.no_grad():
        wanted = teacher(images.images)
        after, before = (
            kd_divergence(model(images.images), wanted, 4.0).mean() for model in (student, warm)
        )
    assert after < 0.75 * before


def test_given_images_are_learned_from_and_a_seed_decides_the_student():
    generator = torch.Generator().manual_seed(5)
    given = Images(torch.randn(16, *DATA.shape, generator=generator), torch.zeros(16).long())
    _, student, images, stages = _train("w3a3", given=given)
    assert images is given
    assert "synthesize" not in stages
    assert _same(student, _train("w3a3", given=given)[1])
    assert not _same(student, _train("w3a3", given=given, seed=1)[1])


def test_the_teacher_stays_and_every_effort_has_its_numbers():
    assert _same(_train("w3a3")[0], _teacher())
    steps = [RECIPE_EFFORTS[effort].distill_steps for effort in ("quick", "default", "full")]
    assert steps == sorted(steps)


def test_mirror_images_change_what_blocks_learn():
    assert not _same(_train("w4a4")[1], _train("w4a4", replace(CONFIG, mirror=False))[1])


def test_distilling_can_be_left_out():
    assert _train("w3a3", replace(CONFIG, distill_steps=0))[3] == ["synthesize", "reconstruct"]


def test_scales_must_be_learned():
    with pytest.raises(InputError, match="use scales learned"):
        _train("w4a4", scales="minmax")
