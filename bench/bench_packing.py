"""pack_int4 and unpack_int4 on the weights of a layer of ResNet-18, against a copy."""

from functools import partial

import pytest
import torch

from bench.harness import Baseline, Case, choose
from bench.settings import DEVICE
from dfq_kernels import pack_int4, unpack_int4

SHAPES = choose(tiny=(16, 70), usual=(512, 4608), large=(8192, 4608))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_and_unpack(measure, shape):
    values = torch.randint(-8, 8, shape, dtype=torch.int8, device=DEVICE)

    def both():
        return unpack_int4(pack_int4(values), shape[1])

    measure(
        Case(
            op="packing",
            name="pack and unpack",
            size=f"{shape[0]}x{shape[1]} int8",
            run=both,
            check=lambda: torch.testing.assert_close(both(), values, rtol=0, atol=0),
            baselines={"clone": Baseline(partial(torch.clone, values))},
            elements=values.numel(),
            bytes=3 * values.nbytes,
            ops=("quantize",),  # plain PyTorch on every backend: any will do
        )
    )
