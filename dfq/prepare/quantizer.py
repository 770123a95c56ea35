"""The module that puts a tensor on its grid, and how its scale is found or learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dfq.prepare.grid import SMALLEST_SCALE, range_to_scale, to_codes, to_grid
from dfq.prepare.observer import EmaMinMax, minmax
from dfq.types import InputError, QuantSpec

LOG_SMALLEST = math.log(SMALLEST_SCALE)

Mode = Literal["learned", "ema", "dynamic", "fixed"]


class Quantizer(nn.Module):
    """Fake-quantize a tensor to the grid of ``spec``; the scale comes by one of four modes.

    - ``learned``: ``scale`` is trained with the gradient of LSQ (arXiv:1902.08153), times ``1 /
      sqrt(N * quant_max)`` for N elements a scale. Outside the grid x gets no gradient.
    - ``ema``: from a moving average of minima and maxima, taken in while ``observing``.
    - ``fixed``: set once by ``set_qparams``, for a range that is known (an image's).
    - ``dynamic``: from the minimum and maximum of the tensor itself, on every forward (GDFQ's
      weights). In all but the first the gradient passes straight to x, everywhere.

    What is stored is the logarithm of the scale (TQT, arXiv:1903.08066): it stays positive whatever
    the optimizer does, and a step of Adam changes small and large scales by the same ratio. The
    state_dict holds ``scale`` itself, in float64, from which the logarithm comes back bit for bit.

    ``bypass`` lets tensors through as they are; ``drop`` does so with single elements, at that
    probability and at random from ``seed`` (QDrop, ``dropping``). A cast of the module leaves it
    float32.

    Args:
        spec: the grid.
        channels: number of scales, 1 unless ``spec.axis`` is set.
        mode: where the scale comes from.
        device: of the scale.

    Raises:
        InputError: in forward, if there is no scale yet.
    """

    log_scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        channels: int = 1,
        *,
        mode: Mode = "learned",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise InputError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        if spec.axis is None and channels != 1:
            raise InputError(f"a grid without axis has one scale, got channels={channels}.")
        self.spec, self.mode = spec, mode
        self.bypass = self.observing = False
        self.drop = 0.0
        self.seed: Tensor | None = None
        self.has_scale = mode == "dynamic"
        if mode == "dynamic":
            return
        unknown = torch.full((channels,), torch.nan, device=device)
        if mode == "learned":
            self.log_scale = nn.Parameter(unknown)
        else:
            self.register_buffer("log_scale", unknown)
        if mode == "ema":
            self.range = EmaMinMax(channels).to(device)
        self.register_buffer("zero_point", torch.zeros(channels, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, channels along ``spec.axis`` -> the same shape and dtype."""
        if self.observing:
            self.observe(x)
        if self.bypass:
            return x
        if self.mode == "learned":
            scale, zero_point = self.qparams(x)
            scale = _ScaleGradient.apply(scale, self.gradient_factor(x))
            return to_grid(x, scale, zero_point, self.spec, drop=self.drop, seed=self.seed)
        with torch.no_grad():
            values = to_grid(x, *self.qparams(x), self.spec, drop=self.drop, seed=self.seed)
        return _StraightThrough.apply(x, values)

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero_point, each [C], that ``x`` is quantized with."""
        if not self.has_scale:
            raise InputError(
                "a quantizer has no scale yet; call calibrate(student, images) or load a state_dict"
                " of a calibrated student first."
            )
        if self.mode == "dynamic":
            return range_to_scale(*minmax(x, self.spec.axis), self.spec)
        return self.scale, self.zero_point

    @property
    def scale(self) -> Tensor:
        """[C], positive, differentiable; NaN before calibration. Mode ``dynamic`` has none."""
        return self.log_scale.clamp(min=LOG_SMALLEST).exp()

    def gradient_factor(self, x: Tensor) -> float:
        """``1 / sqrt(N * quant_max)`` of LSQ, for the N elements of ``x`` that a scale serves."""
        return (x.numel() / self.log_scale.numel() * self.spec.quant_max) ** -0.5

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over scale and zero_point, each [C]; the scale must be positive."""
        with torch.no_grad():
            self.log_scale.copy_(scale.double().log())
            self.zero_point.copy_(zero_point)
        self.has_scale = True

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the range of ``x`` into the moving average and rescale to it (mode ``ema``)."""
        self.range.update(*minmax(x, self.spec.axis))
        self.set_qparams(*range_to_scale(self.range.low, self.range.high, self.spec))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of ``x``, same shape: int8, or uint8 where the grid is unsigned.

        ``(codes - zero_point) * scale`` is what ``forward`` returns (midrise: ``(codes + 1/2) *
        scale``).
        """
        return to_codes(x, *self.qparams(x), self.spec)

    @property
    def levels(self) -> Tensor:
        """All values on the grid, ascending: [C, 2**bits]. Not for mode ``dynamic``."""
        if self.mode == "dynamic":
            raise InputError("the levels of a dynamic quantizer depend on the tensor: see qparams.")
        scale, zero_point = self.qparams(self.zero_point)
        codes = torch.arange(self.spec.quant_min, self.spec.quant_max + 1, device=scale.device)
        half = 0.5 if self.spec.midrise else 0.0
        return (codes - zero_point[:, None] + half) * scale.detach()[:, None]

    def extra_repr(self) -> str:
        """E.g. ``4-bit symmetric signed per channel, learned scale``."""
        spec = self.spec
        words = [f"{spec.bits}-bit", "symmetric" if spec.symmetric else "asymmetric"]
        words += ["signed" if spec.signed else "unsigned"] + ["midrise"] * spec.midrise
        words += ["per tensor" if spec.axis is None else f"per channel of axis {spec.axis}"]
        return f"{' '.join(words)}, {self.mode} scale"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.mode != "dynamic":
            destination[f"{prefix}scale"] = destination.pop(f"{prefix}log_scale").double().exp()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *lists: Any
    ) -> None:
        outside, inside = f"{prefix}scale", f"{prefix}log_scale"
        if outside in state_dict:
            state_dict[inside] = state_dict.pop(outside).double().log().float()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        missing[:] = [outside if name == inside else name for name in missing]
        if self.mode != "dynamic" and not self.log_scale.is_meta:
            self.has_scale = bool(self.log_scale.isfinite().all())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # A cast touches floats only, so integers with the same bits pass through .half() unharmed.
        return super()._apply(lambda t: fn(t.view(torch.int32)).view(torch.float32), recurse)


class _ScaleGradient(torch.autograd.Function):
    """The identity, with a factor on the gradient."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _StraightThrough(torch.autograd.Function):
    """``values``, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
