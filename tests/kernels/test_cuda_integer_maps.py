"""The index maps of csrc/core for tensor cores, every element of them, through pybind11."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dfq_kernels.qconv2d import Window

maps = pytest.importorskip(
    "dfq_kernels._arithmetic", reason="compile it with `python -m dfq_kernels.build`"
)
LANES = np.arange(32)[:, None]
WORD = 4  # bytes


def _fragments(a, b):
    """What the lanes hold of A, [16, 32] bytes, and of B, [8, 32]."""
    words_of_a = a.reshape(-1).view(np.uint32)[maps.word_of_a(LANES, np.arange(4)) // WORD]
    words_of_b = b.reshape(-1).view(np.uint32)[maps.word_of_b(LANES, np.arange(2)) // WORD]
    return words_of_a, words_of_b


def test_every_word_is_held_once():
    """Of A, of B and of the sums, each by one lane."""
    for found, words in (
        (maps.word_of_a(LANES, np.arange(4)), np.arange(0, 16 * 32, WORD)),
        (maps.word_of_b(LANES, np.arange(2)), np.arange(0, 8 * 32, WORD)),
        (maps.cell_of_sum(LANES, np.arange(4)), np.arange(16 * 8)),
    ):
        np.testing.assert_array_equal(np.sort(found, axis=None), words)


def test_lanes_hold_what_the_ptx_manual_says():
    """mma.m16n8k32, .s8: 'groupID' is a lane / 4, 'threadID_in_group' a lane % 4."""
    group, thread = LANES // 4, LANES % 4
    i = np.arange(16)  # of the integers of A in a lane, four a word
    row = np.where((i < 4) | ((i >= 8) & (i < 12)), group, group + 8)
    column = thread * 4 + i % 4 + np.where(i < 8, 0, 16)
    np.testing.assert_array_equal((row * 32 + column)[:, ::4], maps.word_of_a(LANES, np.arange(4)))
    i = np.arange(8)
    k = thread * 4 + i % 4 + np.where(i < 4, 0, 16)
    np.testing.assert_array_equal((group * 32 + k)[:, ::4], maps.word_of_b(LANES, np.arange(2)))
    i = np.arange(4)
    row, column = np.where(i < 2, group, group + 8), thread * 2 + i % 2
    np.testing.assert_array_equal(row * 8 + column, maps.cell_of_sum(LANES, i))


def test_named_segments_bring_each_lane_its_words():
    """ldmatrix: a word of segments that other lanes name."""
    i = np.arange(4)
    segments_of_a, segments_of_b = (
        of(LANES[:, 0]) for of in (maps.segment_of_a, maps.segment_of_b)
    )
    names, within = maps.namer(LANES, i), LANES % 4 * WORD
    np.testing.assert_array_equal(segments_of_a[names] * 16 + within, maps.word_of_a(LANES, i))
    two = np.concatenate([maps.word_of_b(LANES, i[:2]), maps.word_of_b(LANES, i[:2]) + 8 * 32], 1)
    np.testing.assert_array_equal(segments_of_b[names] * 16 + within, two)


@pytest.mark.parametrize("segments", [2, 4, 8])
def test_slots_are_all_different_and_columns_of_them_in_all_banks(segments):
    rows, indices = np.arange(64)[:, None], np.arange(segments)
    slots = maps.slot_of_segment(rows, indices, segments)
    np.testing.assert_array_equal(np.sort(slots, axis=None), np.arange(64 * segments))
    np.testing.assert_array_equal(slots // segments, np.broadcast_to(rows, slots.shape))
    banks = np.sort(slots.reshape(8, 8, segments) % 8, axis=1)  # eight rows at a time
    np.testing.assert_array_equal(banks, np.broadcast_to(np.arange(8)[:, None], banks.shape))
    step = np.arange(0, segments, 2)  # what the kernels rely on, of segments two apart
    for index in range(2):
        within = slots[:, index : index + 1] % segments
        np.testing.assert_array_equal(slots[:, index + step] % segments, within ^ step)


def _nibbles(array):
    """[.., bytes] as two integers a byte; in which order does not matter here."""
    signed = array.view(np.int8).astype(np.int32)
    lower = ((signed & 15) ^ 8) - 8
    return np.concatenate([lower, signed >> 4], axis=-1)


def test_products_of_fragments_are_those_of_matrices():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.integers(0, 256, (rows, 32), dtype=np.uint8) for rows in (16, 8))
        words = _fragments(a, b)
        wide = [m.view(np.int8).astype(np.int32) for m in (a, b)]
        np.testing.assert_array_equal(maps.products_int8(*words), wide[0] @ wide[1].T)
        np.testing.assert_array_equal(maps.products_int4(*words), _nibbles(a) @ _nibbles(b).T)


def test_every_product_of_two_integers():
    byte = np.arange(256, dtype=np.uint32)
    signed = byte.astype(np.uint8).view(np.int8).astype(np.int32)
    for place in range(4):
        x, w = byte[:, None] << 8 * place, byte[None, :] << 8 * place
        found = maps.dot_int8(x, w, 7)
        np.testing.assert_array_equal(found, 7 + signed[:, None] * signed[None, :])
        nibbles = _nibbles(byte.astype(np.uint8)[:, None])
        found = maps.dot_int4(x, w, 7)
        np.testing.assert_array_equal(found, 7 + nibbles @ nibbles.T)


def test_the_quotient_of_every_value():
    values = np.arange(2**20, dtype=np.int32)
    divisors = [1, 2, 3, 5, 7, 9, 16, 19, 48, 64, 127, 147, 1000, 4097, 65793, 2**20 - 1, 2**20]
    for divisor in [*divisors, *range(10, 600, 37)]:
        found = maps.quotient_by_product(values, divisor)
        np.testing.assert_array_equal(found, values // divisor)


PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=PAIR,
    stride=PAIR,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    dilation=PAIR,
    groups=st.integers(1, 3),
    tap=st.sampled_from([1, 3, 4, 16, 33]),
)
def test_windows_are_those_of_unfold(size, kernel, stride, padding, dilation, groups, tap):
    window = Window(stride, padding, dilation, groups)
    out_size = window.output_size(size, kernel)
    assume(min(out_size) > 0)
    channels = groups * tap
    images = torch.arange(2.0 * size[0] * size[1] * channels, dtype=torch.float64) + 1
    images = images.view(2, *size, channels).permute(0, 3, 1, 2)[:, :tap]
    columns = F.unfold(images, kernel, dilation, padding, stride)  # [B, C * taps, pixels]
    taps = kernel[0] * kernel[1]
    rows = columns.view(2, tap, taps, -1).permute(0, 3, 2, 1).reshape(-1, taps * tap)
    found = maps.window_offsets(
        size,
        out_size,
        stride,
        padding,
        dilation,
        kernel[1],
        channels,
        tap,
        rows.shape[0],
        rows.shape[1],
    )
    np.testing.assert_array_equal(found, rows.numpy() - 1)
