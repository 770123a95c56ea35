"""Images in, scales set: what a prepared student needs before it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfq.hooks import removing
from dfq.prepare.frozen import evaluating
from dfq.prepare.layers import quantized_layers
from dfq.prepare.observer import SAMPLE, Sample, search_scale
from dfq.prepare.quantizer import Quantizer
from dfq.types import InputError


@torch.no_grad()
def calibrate(student: nn.Module, images: Tensor, *, batch_size: int = 64) -> None:
    """Set every scale of a prepared ``student``, in place: the same call gives the same bits.

    Learned scales start where ``search_scale`` finds them. Weights are searched as they are. Inputs
    are searched in the order in which they flow, behind the quantized layers before them: first in
    the first batch, with which the others then run, at last in a bounded sample of all batches.
    Moving averages (``scales="minmax"``) start anew. Each batch runs once.

    Args:
        student: from ``prepare``.
        images: [N, ...], as the model takes them.
        batch_size: images in flight; bounds the memory.

    Raises:
        InputError: if there are no images or quantizers, or a layer meets NaN or infinity.
    """
    names = {module: n for n, module in student.named_modules() if isinstance(module, Quantizer)}
    if not names:
        raise InputError("the model has no quantizers; call prepare(model, bits) first.")
    if len(images) == 0 or batch_size < 1:
        raise InputError(f"got {len(images)} images in batches of {batch_size}; give at least one.")
    weights = _search_weights(student, names)
    inputs = {q: n for q, n in names.items() if q.mode == "learned" and q not in weights}
    batches = images.split(batch_size)
    averages = {q: n for q, n in names.items() if q.mode == "ema"}
    with evaluating(student):
        if averages:
            _average_ranges(student, batches, averages)
        if inputs:
            _search_inputs(student, batches, inputs)


@contextmanager
def observing(student: nn.Module) -> Iterator[None]:
    """Within, every forward takes its ranges into the moving averages (``scales="minmax"``)."""
    averages = [q for q in student.modules() if isinstance(q, Quantizer) and q.mode == "ema"]
    before = [q.observing for q in averages]
    try:
        for q in averages:
            q.observing = True
        yield
    finally:
        for q, was in zip(averages, before, strict=True):
            q.observing = was


def _search_weights(student: nn.Module, names: dict[Quantizer, str]) -> set[Quantizer]:
    """Scale the learned weight quantizers; return all weight quantizers."""
    quantizers = set()
    for layer in quantized_layers(student).values():
        quantizer = layer.weight_quantizer
        quantizers.add(quantizer)
        _check_finite(names[quantizer], layer.weight)
        if quantizer.mode == "learned":
            quantizer.set_qparams(*search_scale(layer.weight, quantizer.spec))
    return quantizers


def _average_ranges(
    student: nn.Module, batches: tuple[Tensor, ...], names: dict[Quantizer, str]
) -> None:
    for quantizer in names:
        quantizer.range.reset()
    with observing(student):
        for batch in batches:
            _run(student, batch)
    for quantizer, name in names.items():
        if quantizer.has_scale:
            _check_finite(name, quantizer.log_scale)


def _search_inputs(
    student: nn.Module, batches: tuple[Tensor, ...], names: dict[Quantizer, str]
) -> None:
    rng = torch.Generator().manual_seed(0)
    samples = {quantizer: Sample(SAMPLE // len(batches) + 1, rng) for quantizer in names}
    first = True

    def collect(quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
        sample = samples[quantizer]
        sample.add(args[0])
        _check_finite(names[quantizer], torch.cat(sample.span()))
        if first:
            quantizer.set_qparams(*sample.search(quantizer.spec))

    with removing(quantizer.register_forward_pre_hook(collect) for quantizer in names):
        for batch in batches:
            _run(student, batch)
            first = False
    for quantizer, sample in samples.items():
        if len(batches) > 1 and sample.parts:  # a layer that the model skips has no sample
            quantizer.set_qparams(*sample.search(quantizer.spec))


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise InputError(f"{name} meets NaN or infinite values; check the images and the weights.")


def _run(student: nn.Module, batch: Tensor) -> None:
    some = next(student.parameters())
    student(batch.to(device=some.device, dtype=some.dtype))
