"""Packed 4-bit integers as int8: 16 times each, so that no sign has to be brought down."""

import triton
import triton.language as tl


@triton.jit
def halves(packed, ASM: tl.constexpr):
    """16 times the first and the second 32 elements of each block; four bytes at once with ASM.

    Byte by byte the loop of a matrix product has twice the instructions; the interpreter knows no
    assembler.
    """
    if ASM:
        first, second = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; "
            "and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        signed = packed.to(tl.int8, bitcast=True)
        first, second = signed << 4, signed & -16
    return first, second


@triton.jit
def whole(packed, ASM: tl.constexpr):
    """16 times the integers of ``packed`` [R, B * 32], in their order: [R, B * 64]."""
    first, second = halves(packed, ASM)
    rows: tl.constexpr = packed.shape[0]
    blocks: tl.constexpr = packed.shape[1] // 32
    both = tl.join(first.reshape(rows, blocks, 32), second.reshape(rows, blocks, 32))
    return both.permute(0, 1, 3, 2).reshape(rows, blocks * 64)


@triton.jit
def gather(row, k, mask):
    """16 times the elements ``k`` of the packed rows that begin at ``row``; int8."""
    byte = tl.load(row + k // 64 * 32 + k % 32, mask=mask, other=0)
    shifted = tl.where(k % 64 < 32, byte << 4, byte & 0xF0)
    return shifted.to(tl.int8, bitcast=True)


@triton.jit
def packed(values):
    """[R, C] of int8 as [R, C / 2] of uint8."""
    rows: tl.constexpr = values.shape[0]
    blocks: tl.constexpr = values.shape[1] // 64
    pairs = values.reshape(rows, blocks, 2, 32).permute(0, 1, 3, 2)
    first, second = tl.split(pairs)
    return ((first & 15) | (second << 4)).to(tl.uint8, bitcast=True).reshape(rows, blocks * 32)
