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


def pack_channels(codes: Tensor, axis: int = 1) -> Tensor:
    """Activations from -8 to 7, packed along their channels, as ``qconv2d`` and ``qlinear`` read.

    Args:
        codes: int8; [B, C, H, W] of ``qconv2d``, [..., K] with axis -1 of ``qlinear``.
        axis: of the channels, whose number must be a multiple of 64.

    Returns:
        uint8, half as many channels; they are neighbours in memory.

    Raises:
        ValueError: if ``codes`` is not int8, or has another number of channels.
    """
    check_packed("a tensor", codes.shape[axis])
    return pack_int4(codes.movedim(axis, -1)).movedim(-1, axis)


def unpack_channels(x: Tensor, axis: int = 1) -> Tensor:
    """What ``pack_channels`` packed, int8; what is not uint8 stays as it is."""
    if x.dtype != torch.uint8:
        return x
    rows = x.movedim(axis, -1)
    return unpack_int4(rows, 2 * rows.shape[-1]).movedim(-1, axis)


def channels_of(x: Tensor, axis: int) -> int:
    """Of an input, whether packed or not."""
    return x.shape[axis] * (2 if x.dtype == torch.uint8 else 1)


def check_packed(name: str, channels: int, groups: int = 1) -> None:
    """Whether a layer can have packed activations.

    Raises:
        ValueError: if it cannot.
    """
    if channels % PACK_BK or groups != 1:
        raise ValueError(
            f"{name} may be packed only with a multiple of {PACK_BK} channels and groups=1, got "
            f"{channels} channels and groups={groups}; keep it in int8."
        )


def packed_size(size: int) -> int:
    """Bytes that ``size`` packed integers take."""
    return -(-size // PACK_BK) * (PACK_BK // 2)
