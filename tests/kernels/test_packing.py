"""pack_int4 and unpack_int4: every byte, and the format that kernels rely on."""

import numpy as np
import pytest
import torch

from dfq_kernels.packing import PACK_BK, pack_int4, packed_size, unpack_int4

SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 576]


@pytest.mark.parametrize("size", SIZES)
def test_unpacking_undoes_packing(size):
    values = torch.randint(-8, 8, (3, 2, size), dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 2, packed_size(size))
    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed, size), values)


def test_every_byte():
    """Each of the 256 in each of the 32 places of a block."""
    packed = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, PACK_BK // 2)
    values = unpack_int4(packed, PACK_BK)
    lower, upper = packed.int() & 15, packed.int() >> 4
    expected = torch.cat((lower, upper), dim=1)
    assert torch.equal(values.int(), torch.where(expected < 8, expected, expected - 16))
    assert torch.equal(pack_int4(values), packed)


@pytest.mark.parametrize("size", [64, 200])
def test_the_halves_of_a_block_share_bytes(size):
    values = torch.randint(-8, 8, (size,), dtype=torch.int8)
    packed = pack_int4(values).tolist()
    for k, value in enumerate(values.tolist()):
        block, within = divmod(k, PACK_BK)
        byte = packed[block * PACK_BK // 2 + within % (PACK_BK // 2)]
        assert (byte >> 4 if within >= PACK_BK // 2 else byte & 15) == value & 15


def test_what_fills_the_last_block_is_zero():
    packed = pack_int4(torch.full((70,), -1, dtype=torch.int8))
    assert packed[:32].tolist() == [0xFF] * 32
    assert packed[32:].tolist() == [0x0F] * 6 + [0] * 26


def test_other_integers_keep_their_lower_four_bits():
    values = torch.arange(-128, 128).to(torch.int8)
    expected = ((values.int() + 8) % 16 - 8).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(values), 256), expected)


def test_sliced_values():
    values = torch.randint(-8, 8, (6, 200), dtype=torch.int8)[::2, 3::2]
    assert torch.equal(unpack_int4(pack_int4(values), values.shape[1]), values)


def test_core_agrees():
    arithmetic = pytest.importorskip("dfq_kernels._arithmetic")
    byte = np.arange(256, dtype=np.uint8)
    values = unpack_int4(torch.from_numpy(byte)[:, None].expand(256, PACK_BK // 2), PACK_BK).numpy()
    np.testing.assert_array_equal(arithmetic.unpack_nibble(byte, False), values[:, 0])
    np.testing.assert_array_equal(arithmetic.unpack_nibble(byte, True), values[:, -1])
    np.testing.assert_array_equal(arithmetic.pack_nibbles(values[:, 0], values[:, -1]), byte)
    k = np.arange(300)
    row = np.random.default_rng(0).integers(-8, 8, 300).astype(np.int8)
    packed = pack_int4(torch.from_numpy(row)).numpy()
    found = arithmetic.unpack_nibble(
        packed[arithmetic.packed_byte(k)], arithmetic.packed_in_upper(k)
    )
    np.testing.assert_array_equal(found, row)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"must be int8 .* got torch.int32"):
        pack_int4(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="uint8 with 64 bytes for 65 integers"):
        unpack_int4(torch.zeros(32, dtype=torch.uint8), 65)
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        unpack_int4(torch.zeros(32, dtype=torch.int8), 64)
