"""``dfq info --check``: every kernel backend of this machine against the reference, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dfq_kernels import (
    Epilogue,
    Int8Grid,
    Window,
    _backend,
    batch_norm,
    batch_norm_statistics,
    fake_quantize,
    fake_quantize_all,
    integer_weight,
    pack_channels,
    qconv2d,
    qlinear,
    quantize,
    requantize,
)

SHAPES = ((3, 8, 16, 16), (2, 5, 7, 3), (1, 1, 1, 1), (4, 33, 31, 1))  # [B, C, H, W]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# sums are taken in another order by each backend: within float32's rounding of their terms
RTOL, ATOL = 1e-5, 1e-4

Results = Iterator[tuple[str, Tensor]]  # name and value; a name that ends in "sum" is a reduction
Case = Callable[[Tensor, Tensor], Results]


def check() -> tuple[list[str], bool]:
    """One line for each op of each available backend, and whether all of them agree."""
    lines, agreed = [], True
    for status in _backend.report():
        if not status.available or status.backend == "reference":
            continue
        for op, case in CASES.items():
            found = _compare(op, case, status)
            agreed = agreed and not found.startswith("differs")
            lines.append(f"{status.device:5}{status.backend:11}{op}: {found}")
    return lines or ["nothing but the reference is available here"], agreed


def _compare(op: str, case: Case, status: _backend.Status) -> str:
    """'agrees with the reference ...', or what differs."""
    if _backend.variant(op, status.backend, status.device) is None:
        return "this backend has none, the next one runs"
    count = 0
    for shape in SHAPES:
        for dtype in DTYPES:
            arguments = _tensors(shape, dtype, status.device)
            with _backend.use("reference"):
                expected = list(case(*arguments))
            with _backend.use(status.backend):
                actual = list(case(*arguments))
            for (name, wanted), (_, got) in zip(expected, actual, strict=True):
                count += 1
                if not _agree(name, wanted, got):
                    return f"differs from the reference in {name} of {dtype} {list(shape)}"
    return f"agrees with the reference on {count} tensors"


def _agree(name: str, wanted: Tensor, got: Tensor) -> bool:
    if name.endswith("sum"):
        return torch.allclose(wanted.float(), got.float(), RTOL, ATOL)
    return wanted.dtype == got.dtype and torch.equal(wanted, got)


def _tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """``x`` and a gradient; one in eight values lies on a rounding tie of a grid of scale 1/4."""
    rng = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=rng) for _ in range(2))
    ties = torch.rand(shape, generator=rng) < 1 / 8
    x = torch.where(ties, (x * 4).round() / 4 + 1 / 8, x)
    return x.to(device, dtype), grad.to(device, dtype)


def _fake_quantize(x: Tensor, grad: Tensor) -> Results:
    channels = torch.linspace(0.1, 0.4, x.shape[1], device=x.device)
    for axis, scale in ((None, channels[-1:] * 0 + 0.25), (1, channels)):
        a, b, c = (t.clone().requires_grad_() for t in (x, scale, scale * 0 + 3))
        y = fake_quantize(a, b, c, 0, 15, axis)
        da, db, dc = torch.autograd.grad(y, (a, b, c), grad)
        yield from (("y", y), ("dx", da), ("dscale sum", db), ("dzero_point sum", dc))
    seed = torch.tensor([3], device=x.device)
    yield "dropped y", fake_quantize(x, scale, scale * 0 + 3, 0, 15, 1, drop=0.5, seed=seed)


def _batch_norm(x: Tensor, grad: Tensor) -> Results:
    ramp = torch.linspace(-1, 1, x.shape[1], device=x.device)
    for relu in (False, True):
        a, b, c = (t.clone().requires_grad_() for t in (x, 1 + ramp / 2, ramp))
        y, mean, var = batch_norm(a, ramp, ramp.abs() + 0.5, b, c, relu=relu)
        yield from (("y", y), ("mean sum", mean), ("var sum", var))
        da, db, dc = torch.autograd.grad((y, mean), (a, b, c), (grad, torch.ones_like(mean)))
        yield from (("dx sum", da), ("dweight sum", db), ("dbias sum", dc))


def _batch_norm_statistics(x: Tensor, grad: Tensor) -> Results:
    mean, var = batch_norm_statistics(x, grad.float().mean((0, 2, 3)))
    yield from (("mean sum", mean), ("var sum", var))


def _fake_quantize_all(x: Tensor, grad: Tensor) -> Results:
    xs = [x.contiguous().requires_grad_(), x[:1].float().contiguous().requires_grad_()]
    scales = [torch.linspace(0.1, 0.4, len(t), device=x.device).requires_grad_() for t in xs]
    zeros = [torch.zeros_like(scale) for scale in scales]
    ys = fake_quantize_all(xs, scales, zeros, [-8, -2], [7, 1])
    yield from (("y", y) for y in ys)
    first, second, *sums = torch.autograd.grad(ys, (*xs, *scales), (grad, grad[:1].float()))
    yield from (("dx", first), ("dx", second), *(("dscale sum", each) for each in sums))


def _codes(x: Tensor, zero_point: float, quant_max: int, offset: int) -> Tensor:
    scale = torch.tensor([0.25], device=x.device)
    return quantize(x, scale, scale * 0 + zero_point, 0, quant_max, offset)


def _quantize(x: Tensor, grad: Tensor) -> Results:
    yield from (("4 bits", _codes(x, 3, 15, 3)), ("8 bits", _codes(x, 100, 255, 128)))


def _requantize(x: Tensor, grad: Tensor) -> Results:
    yield "codes", requantize(_codes(x, 100, 255, 128), (0.25, 1.7), -28, Int8Grid(0, 0, 15))


def _qconv2d(x: Tensor, grad: Tensor) -> Results:
    values = _codes(grad[:1, :, :3, :1], 8, 15, 8)
    for name, axes in (("y", (0, 2, 3, 1)), ("y, depthwise,", (1, 2, 3, 0))):
        filters = values.permute(axes).contiguous()
        out, height, *_ = filters.shape
        window = Window(padding=(height // 2, 0), groups=out if out > 1 else 1)
        multiplier, bias = (torch.full((out,), 1 / n, device=x.device) for n in (7, 3))
        for four_bits in (False, True):
            weight = integer_weight(filters, four_bits=four_bits)
            for grid in (None, Int8Grid(-3, -128, 127)):
                epilogue = Epilogue(multiplier, bias, relu=grid is None, grid=grid)
                yield name, qconv2d(_codes(x, 3, 15, 0), weight, epilogue, window, x_zero=3)
    yield "y, two in a byte,", _packed(x)


def _packed(x: Tensor) -> Tensor:
    """Of a layer of 64 channels whose activations have 4 bits."""
    codes = _codes(x.repeat(1, 64, 1, 1)[:, :64], 3, 15, 8)
    values = torch.arange(64 * 64, device=x.device).remainder(15).sub(7).to(torch.int8)
    weight = integer_weight(values.view(64, 1, 1, 64))
    multiplier, grid = torch.full((64,), 1 / 30, device=x.device), Int8Grid(0, -8, 7, packed=True)
    return qconv2d(pack_channels(codes), weight, Epilogue(multiplier, grid=grid), x_zero=-5)


def _qlinear(x: Tensor, grad: Tensor) -> Results:
    codes = _codes(x.flatten(1), 100, 255, 128)
    weight = integer_weight(_codes(grad.flatten(1), 100, 255, 128))
    epilogue = Epilogue(torch.full((len(grad),), 0.01, device=x.device))
    yield "y", qlinear(codes, weight, epilogue, x_zero=-28)


CASES: dict[str, Case] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_all": _fake_quantize_all,
    "batch_norm": _batch_norm,
    "batch_norm_statistics": _batch_norm_statistics,
    "quantize": _quantize,
    "requantize": _requantize,
    "qconv2d": _qconv2d,
    "qlinear": _qlinear,
}
