"""fake_quantize against ATen, the eager composite, torch.compile, and QDrop in separate ops.

1.6 million elements, the size of an activation of ResNet-18; on a GPU 51 million as well.
"""

from functools import partial

import pytest
import torch

from bench.harness import Baseline, Case, against_compile, choose, describe, run_op
from bench.settings import DEVICE
from dfq_kernels import fake_quantize
from dfq_kernels.fake_quantize import fake_quantize_backward_reference, fake_quantize_reference

SHAPES = choose(tiny=(2, 16, 5, 5), usual=(8, 64, 56, 56), large=(256, 64, 56, 56))
WEIGHTS = choose(tiny=(16, 50), usual=(512, 3136), large=(8192, 6272))
LARGE = choose(tiny=1000, usual=12_800_000)[0]
PER_CHANNEL = [
    *(("weights", shape) for shape in WEIGHTS),
    *((layout, shape) for layout in ("NCHW", "channels_last") for shape in SHAPES),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = (-8, 7)
PLAIN = (None, 0.0, None)  # axis, drop, seed
NEEDS = (True, True, True)

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
per_channel = pytest.mark.parametrize(("layout", "shape"), PER_CHANNEL, ids=str)

aten_learnable = torch._fake_quantize_learnable_per_tensor_affine
aten_backward = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
aten_channel_backward = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward


def composite(x, scale, zero_point, quant_min, quant_max):
    ratio = x * (1 / scale)
    code = ratio + (ratio.round() - ratio).detach() + zero_point
    return ((code.clamp(quant_min, quant_max) - zero_point) * scale).to(x.dtype)


def composite_forward(x, scale, zero_point, quant_min, quant_max):
    code = (torch.round(x * (1 / scale)) + zero_point).clamp(quant_min, quant_max)
    return ((code - zero_point) * scale).to(x.dtype)


def backward_of(function, grad, x, scale, zero_point, shape):
    """A run of the backward of ``function`` alone."""
    inputs = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    # a compiled function would write its gradients over what the next run needs
    with torch._functorch.config.patch(donated_buffer=False):
        y = function(inputs[0], inputs[1].view(shape), inputs[2].view(shape), *BOUNDS)
        torch.autograd.grad(y, inputs, grad, retain_graph=True)
    return partial(torch.autograd.grad, y, inputs, grad, retain_graph=True)


def only_for_fp32(x, aim):
    return aim if x.dtype == torch.float32 else None


def tensor_case(shape, dtype=torch.float32):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x, torch.tensor([0.1], device=DEVICE), torch.zeros(1, device=DEVICE)


def channel_case(layout, shape):
    """x, scale, zero_point, axis, and the shape that broadcasts scale."""
    x = torch.randn(shape, device=DEVICE)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    axis = 0 if layout == "weights" else 1
    broadcast = [1] * x.ndim
    broadcast[axis] = channels = x.shape[axis]
    scale = torch.rand(channels, device=DEVICE) * 0.1 + 0.05
    return x, scale, torch.zeros_like(scale), axis, broadcast


def check_forward(*args):
    y = run_op("fake_quantize", *args)
    torch.testing.assert_close(y, fake_quantize_reference(*args), rtol=0, atol=0)


def check_backward(*args):
    ours = run_op("fake_quantize_backward", *args)
    expected = fake_quantize_backward_reference(*args)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=0)
    terms = args[0].double().abs().sum().item() * 16
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-6, atol=1e-7 * terms)


def case(x, **fields):
    return Case(size=describe(x), elements=x.numel(), **fields)


@shapes
@dtypes
def test_forward(measure, dtype, shape):
    x, scale, zero_point = args = tensor_case(shape, dtype)
    baselines = {
        "ATen": Baseline(
            lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, *BOUNDS), only_for_fp32(x, 15)
        ),
        "eager composite": Baseline(lambda: composite_forward(*args, *BOUNDS), only_for_fp32(x, 4)),
        **against_compile(x, composite_forward, lambda fast: partial(fast, *args, *BOUNDS)),
        "clone": Baseline(x.clone),
    }
    if dtype != torch.float32:
        wide = partial(fake_quantize, x.float(), scale, zero_point, *BOUNDS)
        # 1 is the aim for bfloat16; a tenth is left to the noise of the clock
        baselines["ours in fp32"] = Baseline(wide, 0.9 if dtype == torch.bfloat16 else None)
    measure(
        case(
            x,
            op="fake_quantize",
            name="forward",
            run=partial(fake_quantize, *args, *BOUNDS),
            check=partial(check_forward, *args, *BOUNDS, *PLAIN),
            baselines=baselines,
            bytes=2 * x.nbytes,
        )
    )


@per_channel
def test_forward_per_channel(measure, layout, shape):
    x, scale, zero_point, axis, broadcast = channel_case(layout, shape)
    views = scale.view(broadcast), zero_point.view(broadcast)
    codes = zero_point.int()
    aten = partial(torch.fake_quantize_per_channel_affine, x, scale, codes, axis, *BOUNDS)
    compiled = against_compile(x, composite_forward, lambda fast: partial(fast, x, *views, *BOUNDS))
    measure(
        case(
            x,
            op="fake_quantize",
            name=f"forward, per channel (axis {axis})",
            run=partial(fake_quantize, x, scale, zero_point, *BOUNDS, axis=axis),
            check=partial(check_forward, x, scale, zero_point, *BOUNDS, axis, 0.0, None),
            baselines={
                "ATen": Baseline(aten, 10),
                "eager composite": Baseline(lambda: composite_forward(x, *views, *BOUNDS), 4),
                **compiled,
            },
            bytes=2 * x.nbytes,
        )
    )


@shapes
@dtypes
def test_backward(measure, dtype, shape):
    x, scale, zero_point = tensor_case(shape, dtype)
    grad = torch.randn_like(x)
    args = (grad, x, scale, zero_point)
    plain = backward_of(composite, *args, [1] * 4)
    baselines = {"eager composite": Baseline(plain, only_for_fp32(x, 4))}
    if dtype != torch.float16:  # which ATen refuses
        aten = partial(aten_backward, *args, *BOUNDS, 1.0)
        baselines["ATen learnable"] = Baseline(aten, only_for_fp32(x, 15), gpu_aim=2)
    baselines |= against_compile(x, composite, lambda fast: backward_of(fast, *args, [1] * 4))
    if dtype != torch.float32:
        wide = (grad.float(), x.float(), scale, zero_point, *BOUNDS, *PLAIN, *NEEDS)
        baselines["ours in fp32"] = Baseline(partial(run_op, "fake_quantize_backward", *wide))
    everything = (*args, *BOUNDS, *PLAIN, *NEEDS)
    measure(
        case(
            x,
            op="fake_quantize_backward",
            name="backward, with gradients of scale and zero_point",
            run=partial(run_op, "fake_quantize_backward", *everything),
            check=partial(check_backward, *everything),
            baselines=baselines,
            bytes=3 * x.nbytes,
        )
    )


@per_channel
def test_backward_per_channel(measure, layout, shape):
    x, scale, zero_point, axis, broadcast = channel_case(layout, shape)
    args = (torch.randn_like(x), x, scale, zero_point)
    everything = (*args, *BOUNDS, axis, 0.0, None, *NEEDS)
    aten = partial(aten_channel_backward, *args, axis, *BOUNDS, 1.0)
    plain = backward_of(composite, *args, broadcast)
    compiled = against_compile(x, composite, lambda fast: backward_of(fast, *args, broadcast))
    measure(
        case(
            x,
            op="fake_quantize_backward",
            name=f"backward, per channel (axis {axis})",
            run=partial(run_op, "fake_quantize_backward", *everything),
            check=partial(check_backward, *everything),
            baselines={
                "ATen learnable": Baseline(aten, 10, gpu_aim=2),
                "eager composite": Baseline(plain, 4),
                **compiled,
            },
            bytes=3 * x.nbytes,
        )
    )


@shapes
def test_forward_and_backward(measure, shape):
    """Through autograd, with everything that Python adds."""
    x, scale, zero_point = tensor_case(shape)
    grad = torch.randn_like(x)
    inputs = [x.requires_grad_(), scale.requires_grad_()]

    def both(function):
        y = function(x, scale, zero_point, *BOUNDS)
        return torch.autograd.grad(y, inputs, grad)

    args = (grad, x.detach(), scale.detach(), zero_point, *BOUNDS, *PLAIN, *NEEDS)
    measure(
        case(
            x,
            op="fake_quantize",
            name="forward + backward through autograd",
            run=partial(both, fake_quantize),
            check=partial(check_backward, *args),
            baselines={
                "ATen learnable": Baseline(lambda: both(lambda *a: aten_learnable(*a, 1.0))),
                "eager composite": Baseline(partial(both, composite), 4),
                **against_compile(x, composite, lambda fast: partial(both, fast)),
            },
            bytes=5 * x.nbytes,
            ops=("fake_quantize", "fake_quantize_backward"),
        )
    )


@shapes
def test_drop_forward_and_backward(measure, shape):
    """What QDrop takes through autograd: fake-quant, rand and where."""
    x, scale, zero_point = tensor_case(shape)
    seed, grad = torch.tensor([7], device=DEVICE), torch.randn_like(x)
    drop = (None, 0.5, seed)
    plain = (x.clone(), scale.clone(), zero_point, *BOUNDS)

    def check():
        check_forward(*plain, *drop)
        check_backward(grad, *plain, *drop, *NEEDS)

    inputs = [x.requires_grad_(), scale.requires_grad_()]

    def fused():
        y = fake_quantize(x, scale, zero_point, *BOUNDS, drop=0.5, seed=seed)
        return torch.autograd.grad(y, inputs, grad)

    def separate(quantized):
        y = quantized(x, scale, zero_point, *BOUNDS)
        return torch.autograd.grad(torch.where(torch.rand_like(x) < 0.5, x, y), inputs, grad)

    aten = partial(separate, lambda *args: aten_learnable(*args, 1.0))
    measure(
        case(
            x,
            op="fake_quantize",
            name="forward + backward with QDrop",
            run=fused,
            check=check,
            baselines={
                "ATen + rand + where": Baseline(aten, 10),
                "eager composite + rand + where": Baseline(partial(separate, composite)),
            },
            bytes=5 * x.nbytes,
            ops=("fake_quantize", "fake_quantize_backward"),
        )
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="a question to a CPU")
def test_large_forward_on_two_threads(measure):
    x, scale, zero_point = tensor_case((LARGE,))
    measure(
        case(
            x,
            op="fake_quantize",
            name="forward, two threads",
            run=partial(fake_quantize, x, scale, zero_point, *BOUNDS),
            check=partial(check_forward, x, scale, zero_point, *BOUNDS, *PLAIN),
            baselines={"clone": Baseline(x.clone, 1 / 1.5)},
            bytes=2 * x.nbytes,
            threads=2,
        )
    )
