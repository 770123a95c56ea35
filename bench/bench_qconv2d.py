"""qconv2d on the layers of networks against floating point and oneDNN's int8, channels_last.

Bias, ReLU and requantization to int8 are in every integer run, bias and ReLU in the others. On a
GPU floating point is cuDNN's.
"""

from dataclasses import replace
from functools import partial

import pytest

from bench.harness import Case
from bench.integer_layers import Layer
from bench.settings import DEVICE, TINY
from dfq_kernels import qconv2d

GPU_BATCH = 256
LAYERS = {  # layer, aims on a CPU: times as fast as fp32, as oneDNN
    "ResNet-18, stem": (Layer(8, 3, 224, 64, 7, 2), 2, 0.9),
    "ResNet-18, stage 1": (Layer(8, 64, 56, 64, 3), 3, 0.85),
    "ResNet-18, into stage 2": (Layer(8, 64, 56, 128, 3, 2), 3, 0.85),
    "ResNet-18, shortcut": (Layer(8, 64, 56, 128, 1, 2), 2, None),
    "ResNet-18, stage 2": (Layer(8, 128, 28, 128, 3), 3, 0.85),
    "ResNet-18, stage 3": (Layer(8, 256, 14, 256, 3), 3, 0.85),
    "ResNet-18, stage 4": (Layer(8, 512, 7, 512, 3), 3, 0.85),
    "ResNet-50, 1x1 up": (Layer(8, 64, 56, 256, 1), 3, 0.75),
    "ResNet-50, 1x1 down": (Layer(8, 256, 56, 64, 1), 3, 0.75),
    "ResNet-20, stem": (Layer(250, 3, 32, 16, 3), 1.5, 0.75),
    "ResNet-20, stage 1": (Layer(250, 16, 32, 16, 3), 2, 0.75),
    "ResNet-20, stage 2": (Layer(250, 32, 16, 32, 3), 3, 0.85),
    "ResNet-20, stage 3": (Layer(250, 64, 8, 64, 3), 3, 0.85),
    "MobileNetV1, 1x1": (Layer(8, 32, 112, 64, 1), 3, 0.75),
    "MobileNetV1, late 1x1": (Layer(8, 512, 14, 512, 1), 3, 0.85),
    "MobileNetV1, depthwise": (Layer(8, 64, 112, 64, 3, 2, groups=64), 1.5, 0.75),
    "MobileNetV1, late depthwise": (Layer(8, 512, 14, 512, 3, groups=512), None, None),
    "MobileNetV3, depthwise 5x5": (Layer(8, 240, 28, 240, 5, groups=240), None, None),
}
if DEVICE == "cuda":
    LAYERS = {n: (replace(layer, batch=GPU_BATCH), *aims) for n, (layer, *aims) in LAYERS.items()}
    LAYERS |= {
        "ResNet-50, into stage 3": (Layer(GPU_BATCH, 256, 28, 256, 3, 2), None, None),
        "ResNet-50, shortcut": (Layer(GPU_BATCH, 256, 56, 512, 1, 2), None, None),
        "ResNet-50, late 1x1 up": (Layer(GPU_BATCH, 256, 14, 1024, 1), None, None),
        "ResNet-50, late 1x1 down": (Layer(GPU_BATCH, 1024, 14, 256, 1), None, None),
        "ResNet-50, one image": (Layer(1, 256, 14, 256, 3), None, None),
    }
if TINY:
    LAYERS = {"tiny": (Layer(2, 4, 6, 8, 3), 1, 1), "depthwise": (Layer(1, 8, 6, 8, 3, 2, 8), 1, 1)}


@pytest.mark.parametrize("four_bits", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(measure, name, four_bits):
    layer, *aims = LAYERS[name]
    args = layer.integers(four_bits)
    measure(
        Case(
            op="qconv2d",
            name=f"{name}, {'W4A8' if four_bits else 'W8A8'}",
            size=str(layer),
            run=partial(qconv2d, *args, layer.window),
            check=partial(layer.check, *args),
            baselines=layer.baselines(*aims),
            elements=args[0].numel(),
            extra={"operations": layer.operations},
        )
    )
