"""Convolutions of known networks as integers, and what else computes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from bench.harness import Baseline
from bench.settings import DEVICE
from dfq_kernels import Epilogue, Int8Grid, Window, _backend, integer_weight, prepack, qconv2d

GRID = Int8Grid(-128)
CHECKED = slice(None if DEVICE == "cpu" else 2)  # images
if DEVICE == "cuda":
    torch.backends.cudnn.benchmark = True  # the fastest that floating point has


@dataclass(frozen=True)
class Layer:
    """A convolution with bias and ReLU, square in image, kernel, stride and padding."""

    batch: int
    inputs: int
    size: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self):
        return self.kernel // 2

    @property
    def window(self):
        return Window((self.stride,) * 2, (self.padding,) * 2, groups=self.groups)

    @property
    def operations(self):
        out = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        per_output = 2 * self.inputs // self.groups * self.kernel**2
        return self.batch * self.outputs * out**2 * per_output

    def __str__(self):
        kind = " depthwise" if self.groups > 1 else ""
        return (
            f"{self.batch}x{self.inputs}x{self.size}x{self.size} to {self.outputs}, "
            f"{self.kernel}x{self.kernel}/{self.stride}{kind}"
        )

    def integers(self, four_bits=False):
        """x, weight and epilogue of qconv2d."""
        half = 8 if four_bits else 128
        shape = (self.batch, self.inputs, self.size, self.size)
        x = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
        shape = (self.outputs, self.kernel, self.kernel, self.inputs // self.groups)
        values = torch.randint(-half, half, shape, dtype=torch.int8, device=DEVICE)
        weight = prepack(integer_weight(values, four_bits=four_bits), groups=self.groups)
        multiplier = torch.rand(self.outputs, device=DEVICE) / 5000
        epilogue = Epilogue(multiplier, torch.randn_like(multiplier), None, True, GRID)
        return x.contiguous(memory_format=torch.channels_last), weight, epilogue

    def check(self, x, weight, epilogue):
        """That the op gives what the reference gives on the CPU, on a GPU for the first images."""
        y = qconv2d(x, weight, epilogue, self.window)[CHECKED].cpu()
        weight = replace(weight, values=weight.values.cpu(), prepacked=None)
        multiplier, bias = epilogue.multiplier.cpu(), epilogue.bias.cpu()
        epilogue = replace(epilogue, multiplier=multiplier, bias=bias)
        with _backend.use("reference"):
            expected = qconv2d(x[CHECKED].cpu(), weight, epilogue, self.window)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)

    def in_float(self, dtype):
        """A run of the convolution and its ReLU in floating point."""
        x, weight, epilogue = self.integers()
        w = weight.values.permute(0, 3, 1, 2).to(dtype)
        args = (x.to(dtype), w, epilogue.bias.to(dtype), self.stride, self.padding, 1, self.groups)
        return torch.inference_mode()(lambda: F.conv2d(*args).relu_())

    def in_onednn(self):
        """A run of oneDNN's integer convolution, as torchao lowers one for the CPU."""
        x, weight, epilogue = self.integers()
        scale, shape = torch.rand(self.outputs), list(x.shape)
        geometry = ([self.stride] * 2, [self.padding] * 2, [1, 1], self.groups)
        packed = torch.ops.onednn.qconv_prepack(
            weight.values.permute(0, 3, 1, 2), scale, 0.05, 0, *geometry, shape
        )
        zeros, shifted = torch.zeros(self.outputs, dtype=torch.int32), x.view(torch.uint8)
        output = (0.1, 0, torch.uint8, "relu", [], "")
        return partial(
            torch.ops.onednn.qconv2d_pointwise.default,
            *(shifted, 0.05, 0, packed, scale, zeros, epilogue.bias, *geometry, *output),
        )

    def baselines(self, fp32_aim, onednn_aim):
        found = {
            "fp32": Baseline(self.in_float(torch.float32), fp32_aim),
            "bf16": Baseline(self.in_float(torch.bfloat16)),
        }
        if DEVICE == "cpu":
            found["oneDNN int8"] = Baseline(self.in_onednn(), onednn_aim)
        return found
