"""Images alone, made once and kept for any method and any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq.bounds import COUNT
from dfq.methods import METHODS
from dfq.pipeline.conditions import reproducible
from dfq.pipeline.images import write_images
from dfq.pipeline.inputs import load_inputs
from dfq.pipeline.request import Request, resolve
from dfq.report import Recorder
from dfq.types import DataSpec, Images, InputError, Report, silent


def synthesize(
    model: nn.Module,
    data: DataSpec,
    request: Request,
    *,
    count: int | None = None,
    report: Report = silent,
) -> Images:
    """Make images as ``request.method`` does, without a student.

    Args:
        model: what :func:`dfq.quantize` takes.
        data: shape, classes and normalization of the images it was trained on.
        request: its ``bits`` and what else tells of the student do not matter; ``out`` is the
            ``.npz`` file that is written, if any.
        count: images; None makes as many as the method would.
        report: told of every step.

    Raises:
        InputError: anything above is wrong; nothing was written.
        DivergedError: a loss became NaN or infinite.
    """
    request = resolve_synthesis(request, data, count)
    inputs = load_inputs(model, data, request).to(request.device)
    make = METHODS[request.method].synthesize
    assert make
    options: dict[str, Any] = {"teachers": inputs.teachers} if inputs.teachers else {}
    rng = torch.Generator().manual_seed(request.seed)
    with reproducible(request.threads), Recorder(report) as recorder:
        options |= {"count": count, "rng": rng, "report": recorder}
        images = make(inputs.model, data, request.config, **options)
    if request.out:
        write_images(request.out, images, data)
    return images


def resolve_synthesis(request: Request, data: DataSpec, count: int | None) -> Request:
    """Check every field that needs no model, and fill in ``config`` and ``device``.

    Raises:
        InputError: a field is wrong, the method makes no images by itself, ``count`` is none, or
            the file is there already or cannot be.
    """
    request = resolve(request, data)
    if METHODS[request.method].synthesize is None:
        able = ", ".join(name for name, method in METHODS.items() if method.synthesize)
        raise InputError(
            f"{request.method} makes no images without a student; use --method {able}."
        )
    if request.images:
        raise InputError(f"{request.images} holds images already; leave out --images.")
    COUNT.check(images=count)
    if request.out:
        _check_file(request.out, request.overwrite)
    return request


def _check_file(path: Path, overwrite: bool) -> None:
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise InputError(f"images are written to a .npz file in a folder that exists, got {path}.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InputError(f"{path} exists already; give another --out or add --overwrite.")
