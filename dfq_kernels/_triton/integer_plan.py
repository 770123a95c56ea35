"""Which kernel computes an integer layer, in which tiles: a function of its shape and the GPU.

A linear layer is a convolution of one pixel an image. ``descriptors`` needs the tensor copy engine
of sm_90, ``stem`` serves images of few channels, ``pointers`` computes everything else.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfq_kernels._triton.integer_tuned import tuned

MOST_PIXELS = 256  # of a tile
BLOCK = 64  # of packed integers: dfq_kernels.packing
SHORTEST = 32  # elements of a tile along K: tl.dot takes no fewer of int8
SMALLEST = 16  # elements of a tile along its other sides
MULTIPROCESSORS = 132  # of an H200; an A100 has 108
WIDE = 2**31
ALONE, SHARED = 220 * 1024, 112 * 1024  # shared memory of a program: one, or two at a time


@dataclass(frozen=True)
class Layer:
    """The geometry of a layer; pairs are height and width."""

    batch: int
    size: tuple[int, int]
    channels: int
    out_size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self.batch * math.prod(self.out_size)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def group_inputs(self) -> int:
        return self.channels // self.groups

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.groups

    @property
    def plain(self) -> bool:
        """Whether it is a product of matrices: an output pixel sees the pixel in its place."""
        return self.taps == 1 and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def padded(self) -> bool:
        return self.padding != (0, 0)


@dataclass(frozen=True)
class Kind:
    """What decides beside the geometry.

    Attributes:
        w4, x4: whether weights, and the input, are packed.
        heavy: whether what comes with the sums takes registers of its own: sums of x for a zero of
            the weights; or beside a table of the border a residual, or outputs of 4 bytes.
        aligned: whether the tensors begin at multiples of 16 bytes.
    """

    w4: bool = False
    x4: bool = False
    heavy: bool = False
    aligned: bool = True

    @property
    def packed(self) -> bool:
        return self.w4 or self.x4


@dataclass(frozen=True)
class Tile:
    """What a program computes, and with what."""

    pixels: int
    outputs: int
    depth: int  # elements of K at a time
    warps: int
    stages: int
    swap: bool = False  # outputs are the rows of the product, and not the pixels
    box: tuple[int, int, int] = (1, 1, 1)  # of a descriptor: images, rows, columns
    together: int = 1  # groups in one program


@dataclass(frozen=True)
class Plan:
    """The kernel, "descriptors", "pointers" or "stem", and its tile."""

    kernel: str
    tile: Tile


def architecture(x: Tensor) -> int:
    """10 * major + minor of the compute capability; of what stands in for a GPU, without one."""
    if x.device.type == "cuda":
        return _capability(x.device)
    if x.device.type == "meta":
        from triton.runtime import driver

        return int(driver.active.get_current_target().arch)
    return 90


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.lru_cache(maxsize=4096)
def plan(layer: Layer, kind: Kind, sm: int) -> Plan:
    """For compute capability ``sm``, 10 * major + minor."""
    if sm == 90 and kind.aligned and _fits_descriptors(layer, kind.packed):
        found = tuned(_key(layer, kind), sm)
        return Plan("descriptors", Tile(**found) if found else _descriptor_tile(layer, kind))
    if kind.aligned and _is_stem(layer):
        return Plan("stem", _stem_tile(layer, kind))
    return Plan("pointers", _pointer_tile(layer, kind.packed, sm))


def _key(layer: Layer, kind: Kind) -> str:
    """Of a tuned tile: bits, C, O, kernel, stride, log2 of the pixels."""
    kernel, stride = ("x".join(map(str, pair)) for pair in (layer.kernel, layer.stride))
    bits = f"w{4 if kind.w4 else 8}a{4 if kind.x4 else 8}" + (" heavy" if kind.heavy else "")
    size = math.ceil(math.log2(max(1, layer.pixels)))
    return f"{bits} {layer.channels} {layer.outputs} {kernel} /{stride} 2^{size}"


def _fits_descriptors(layer: Layer, four_bits: bool) -> bool:
    """Rows of whole 16 bytes; strides of 2 only where every second pixel is one of a pair."""
    if layer.groups > 1 or layer.channels % 16 or layer.channels < SHORTEST:
        return False
    if four_bits and layer.taps > 1 and layer.channels % BLOCK:
        return False
    if layer.stride == (1, 1):
        return True
    pairs = layer.stride == (2, 2) and not any(n % 2 for n in layer.size)
    return pairs and layer.channels % (BLOCK if four_bits else SHORTEST) == 0


def _is_stem(layer: Layer) -> bool:
    """Few channels, rows of at most 8 taps that see neighbours; images within 32-bit offsets."""
    rows, columns = layer.kernel
    near = 4 * layer.size[0] * layer.size[1] * (MOST_PIXELS + 1) < WIDE
    few = layer.groups == 1 and layer.channels <= 4 and layer.taps > 1
    return few and near and rows <= 31 and columns <= 8 and layer.dilation[1] == 1


def _stem_tile(layer: Layer, kind: Kind) -> Tile:
    most = 64 if kind.heavy or layer.outputs % 16 else 128
    pixels = min(most, max(SMALLEST, power_of_two(layer.pixels)))
    return Tile(pixels, 64, 32, 4, 4, swap=True)


def _descriptor_tile(layer: Layer, kind: Kind) -> Tile:
    tile = _shape(layer, kind, _depth(layer, kind.packed))
    return tile if layer.plain else _with_box(tile, layer)


def _depth(layer: Layer, packed: bool) -> int:
    """The largest that wastes nothing (in pairs a tile must not reach the next pixel), else 64."""
    whole = [depth for depth in (128, 64, 32) if layer.channels % depth == 0]
    least = BLOCK if packed else SHORTEST
    return next((depth for depth in whole if depth >= least), BLOCK)


def _shape(layer: Layer, kind: Kind, depth: int) -> Tile:
    """Large where that leaves programs for every multiprocessor; at least 64 outputs, for wgmma."""

    def programs(pixels: int, outputs: int) -> int:
        return -(-layer.pixels // pixels) * -(-layer.outputs // outputs)

    wide, most = layer.outputs > 64, MOST_PIXELS
    if kind.packed or kind.heavy:
        most = 64 if kind.x4 and kind.heavy else 128
    if layer.outputs % 16:  # each output is a load and a store of its own
        most = 64
    if wide and most == MOST_PIXELS and programs(256, 128) >= 4 * MULTIPROCESSORS:
        return _staged(256, 128, depth, 8, ALONE)
    if wide and most >= 128 and programs(128, 128) >= MULTIPROCESSORS:
        return _staged(128, 128, depth, 8, SHARED)
    pixels = most
    while pixels > SMALLEST and programs(pixels, 64) < MULTIPROCESSORS:
        pixels //= 2
    return _staged(pixels, 64, depth, 4, SHARED)


def _staged(pixels: int, outputs: int, depth: int, warps: int, memory: int) -> Tile:
    stages = memory // ((pixels + outputs) * depth)
    return Tile(pixels, outputs, depth, warps, max(2, min(4, stages)), swap=True)


def _with_box(tile: Tile, layer: Layer) -> Tile:
    """The box of pixels that wastes the least; of those the one that is widest, then highest."""
    sizes = (layer.batch, *layer.out_size)

    def waste(box: tuple[int, int, int]) -> float:
        return math.prod(-(-n // part) * part for n, part in zip(sizes, box, strict=True))

    bits = tile.pixels.bit_length() - 1
    downward = [(h, w) for w in range(bits, -1, -1) for h in range(bits - w, -1, -1)]
    boxes = [(1 << (bits - h - w), 1 << h, 1 << w) for h, w in downward]
    return replace(tile, box=min(boxes, key=waste))


def _pointer_tile(layer: Layer, four_bits: bool, sm: int) -> Tile:
    """As ``_shape``, smaller for the shared memory of others than sm_80 and sm_90."""
    together = max(1, SHORTEST // layer.group_inputs) if layer.groups > 1 else 1
    together = min(together, layer.groups)
    inputs, outputs = together * layer.group_inputs, together * layer.group_outputs
    depth = min(64, max(SHORTEST, power_of_two(inputs)))
    halves = four_bits and splits_into_halves(layer)
    depth = 64 if halves else depth
    if inputs % 128 == 0 and sm in (80, 90):
        depth = 128
    most = 64 if layer.outputs % 16 else 128  # each output is a load and a store of its own
    rows = min(most, max(SMALLEST, power_of_two(layer.pixels)))
    columns = min(most, max(SMALLEST, power_of_two(outputs)))
    blocks = -(-layer.groups // together) * -(-outputs // columns)
    while rows > 32 and -(-layer.pixels // rows) * blocks < MULTIPROCESSORS:
        rows //= 2
    warps = 8 if rows * columns >= 128 * 128 else 4
    swap = halves or (sm == 90 and columns >= 64)  # wgmma has 64 rows
    return Tile(rows, columns, depth, warps, 3, swap=swap, together=together)


def splits_into_halves(layer: Layer) -> bool:
    """Whether no block of packed weights spans two taps."""
    return layer.groups == 1 and (layer.taps == 1 or layer.channels % BLOCK == 0)


def power_of_two(number: int) -> int:
    """The next one that is no less."""
    return 1 << max(0, number - 1).bit_length()
