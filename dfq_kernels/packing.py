"""Two 4-bit integers a byte: how weights and activations of at most 4 bits are stored.

The format. Along K, the last dimension, blocks of ``PACK_BK`` = 64 elements become 32 bytes each.
Byte ``j`` of a block holds element ``j`` in its lower four bits and element ``j + 32`` in its
upper four, both in two's complement; the last block is filled up with zeros. So ``byte << 4`` and
``byte & 0xf0`` are 16 times the first and the second half of a block, in order: no element has to
move (csrc/core/nibbles.h).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_BK = 64


def pack_int4(values: Tensor) -> Tensor:
    """Pack integers from -8 to 7; of others only the lower four bits are kept.

    Args:
        values: [..., K], int8. For ``qconv2d`` flatten a weight [O, kh, kw, I] to [O, kh * kw * I].

    Returns:
        [..., ceil(K / 64) * 32], uint8, contiguous.

    Raises:
        ValueError: if ``values`` is not int8, or has no dimension.
    """
    if values.dtype != torch.int8 or values.ndim == 0:
        raise ValueError(
            f"values must be int8 of at least one dimension, got {values.dtype} of shape "
            f"{list(values.shape)}; convert them with .to(torch.int8)."
        )
    padded = F.pad(values, (0, -values.shape[-1] % PACK_BK)).view(torch.uint8)
    first, second = padded.unflatten(-1, (-1, 2, PACK_BK // 2)).unbind(-2)
    return (first & 0x0F | second << 4).flatten(-2)


def unpack_int4(packed: Tensor, size: int) -> Tensor:
    """The ``size`` integers that ``pack_int4`` packed along the last dimension.

    Args:
        packed: [..., blocks * 32], uint8.
        size: K, of which ``packed`` holds ``ceil(K / 64)`` blocks.

    Returns:
        [..., size], int8.

    Raises:
        ValueError: if ``packed`` is not uint8, or does not hold ``size`` integers.
    """
    expected = packed_size(size)
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed must be uint8 with {expected} bytes for {size} integers in its last "
            f"dimension, got {packed.dtype} of shape {list(packed.shape)}."
        )
    blocks = packed.unflatten(-1, (-1, PACK_BK // 2)).view(torch.int8)
    halves = torch.stack((blocks << 4, blocks), dim=-2) >> 4  # arithmetic: brings the sign
    return halves.flatten(-3)[..., :size]


def packed_size(size: int) -> int:
    """Bytes that ``size`` packed integers take."""
    return -(-size // PACK_BK) * (PACK_BK // 2)
