"""In every method, students and statistics go through the fused ops."""

import pytest

from tests.methods.test_methods import DISTILLING, TINY, _train
from tests.passes import Passes

STUDENT_STEPS = 8  # of TINY: two batches after the warm-up, four steps each
GENERATOR_STEPS = 2 + 3 * 3  # the first batch has two more
CRITIC_STEPS = {"ddaq": 3}  # of the student, whose gradient the generator follows
ACTIVATION = 8 * 8 * 8 * 8  # [batch, channels, 8, 8] of a student step
IN_TRAINING = 7  # the argument of native_batch_norm_backward that says so


@pytest.mark.parametrize("name", DISTILLING)
def test_training_takes_no_pass_that_an_op_of_ours_could_share(name):
    assert TINY["schedule"].batch_size * 8 * 8 * 8 == ACTIVATION
    with Passes(ACTIVATION) as passes:
        _train(name)
    count = passes.names.count
    separate = [args for op, args in passes.calls if op == "native_batch_norm_backward"]
    assert all(args[IN_TRAINING] for args in separate)  # the generator's own
    # two BatchNorms of the student, two of the teacher whose statistics the generator matches
    student_steps = STUDENT_STEPS + CRITIC_STEPS.get(name, 0)
    assert count("batch_norm_backward") == 2 * student_steps + 2 * GENERATOR_STEPS
    assert count("threshold_backward") == 2 * GENERATOR_STEPS  # the student's ReLUs are fused
    assert count("fake_quantize_backward") >= student_steps  # the input of its second layer
    assert not {"var_mean", "round", "clamp", "where"} & set(passes.names)
