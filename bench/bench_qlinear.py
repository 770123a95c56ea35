"""qlinear against floating point: the classifiers of networks, and on a GPU a large square.

The gate on a GPU is the reference on the CPU, for the first rows.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Baseline, Case, choose
from bench.settings import DEVICE, TINY
from dfq_kernels import Epilogue, _backend, integer_weight, prepack, qlinear

SHAPES = {  # rows, inputs, outputs
    "ResNet-18, batch 8": choose(tiny=(3, 20, 5), usual=(8, 512, 1000))[0],
    "ResNet-18, batch 1": choose(tiny=(1, 20, 5), usual=(1, 512, 1000))[0],
    "square": choose(tiny=(17, 40, 33), usual=(1024, 1024, 1024))[0],
}
if DEVICE == "cuda" and not TINY:
    SHAPES |= {"large square": (8192, 8192, 8192), "ResNet-50, batch 256": (256, 2048, 1000)}
CHECKED = slice(None if DEVICE == "cpu" else 16)


@pytest.mark.parametrize("four_bits", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize("name", SHAPES)
def test_layer(measure, name, four_bits):
    rows, inputs, outputs = SHAPES[name]
    half = 8 if four_bits else 128
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device=DEVICE)
    values = torch.randint(-half, half, (outputs, inputs), dtype=torch.int8, device=DEVICE)
    multiplier = torch.rand(outputs, device=DEVICE) / 500
    epilogue = Epilogue(multiplier, torch.randn_like(multiplier))
    args = (x, prepack(integer_weight(values, four_bits=four_bits)), epilogue)

    def check():
        y = qlinear(*args)[CHECKED].cpu()
        on_cpu = replace(epilogue, multiplier=multiplier.cpu(), bias=epilogue.bias.cpu())
        weight = integer_weight(values.cpu(), four_bits=four_bits)
        with _backend.use("reference"):
            expected = qlinear(x[CHECKED].cpu(), weight, on_cpu)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)

    def in_float(dtype):
        inputs_ = (x.to(dtype), values.to(dtype), epilogue.bias.to(dtype))
        return torch.inference_mode()(partial(F.linear, *inputs_))

    measure(
        Case(
            op="qlinear",
            name=f"{name}, {'W4A8' if four_bits else 'W8A8'}",
            size=f"{rows}x{inputs} to {outputs}",
            run=partial(qlinear, *args),
            check=check,
            baselines={
                "fp32": Baseline(in_float(torch.float32), 1.5 if rows > 1 else None),
                "bf16": Baseline(in_float(torch.bfloat16)),
            },
            elements=x.numel(),
            extra={"operations": 2 * rows * inputs * outputs},
        )
    )
