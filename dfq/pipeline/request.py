"""What to do to a model, and whether that can be done: asked before any work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfq.bounds import COUNT
from dfq.evaluate import check as check_evaluation
from dfq.methods import METHODS
from dfq.pipeline.images import check_images_file
from dfq.pipeline.inputs import Teacher
from dfq.pipeline.provenance import Source
from dfq.prepare import parse_bits
from dfq.types import DataSpec, InputError

NO_SOURCE = Source()


@dataclass(frozen=True)
class Request:
    """What to do to a model; every field but the last four decides the student's bits.

    Attributes:
        bits: ``w4a4`` and the like.
        method: a key of :data:`dfq.methods.METHODS`.
        config: of the method; None means that of ``effort``.
        effort: ``quick``, ``default``, ``full`` or ``paper``.
        protocol: ``brecq`` or ``gdfq``, see :func:`dfq.prepare.prepare`.
        edge_bits: of the first and the last layer; None means what the protocol says.
        scales: ``learned`` or ``minmax``.
        seed: of every random choice.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.
        threads: of the CPU; None leaves torch's number. Another number sums in another order.
        teachers: further models that the images are made from, if the method can.
        images: file of synthetic images to learn from instead of making any.
        out: run folder; None writes nothing.
        overwrite: replace the finished run of another request in ``out``.
        eval_file: real images to measure on once the student is finished.
        source: where the model came from.
    """

    bits: str = "w4a4"
    method: str = "recipe"
    config: Any = None
    effort: str = "default"
    protocol: str = "brecq"
    edge_bits: int | None = None
    scales: str = "learned"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    teachers: tuple[Teacher, ...] = ()
    images: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    eval_file: Path | None = None
    source: Source = NO_SOURCE


def resolve(request: Request, data: DataSpec) -> Request:
    """Check every field that needs no model, and fill in ``config`` and ``device``.

    Raises:
        InputError: a field is wrong.
    """
    parse_bits(request.bits)
    suggested = suggest_config(request.method, request.effort, maps=not data.classes)
    config = request.config or suggested
    wanted = type(suggested)
    if not isinstance(config, wanted):
        raise InputError(
            f"config is {type(config).__name__} but {request.method} takes {wanted.__name__}; "
            "pass that, or an effort."
        )
    if not 0 <= request.seed < 2**63:
        raise InputError(f"seed must be 0 to 2**63 - 1, got {request.seed}.")
    COUNT.check(threads=request.threads)
    _check_sources(request)
    if request.eval_file:
        check_evaluation(request.eval_file, data)
    return dataclasses.replace(request, config=config, device=resolve_device(request.device))


def _check_sources(request: Request) -> None:
    """Refuse teachers or images that the method has no use for."""
    if request.images:
        check_images_file(request.images)
    if request.teachers and request.images:
        raise InputError(
            f"the images of {request.images} are made, so that further teachers have nothing to "
            "do; give --images or --teachers."
        )
    if request.teachers and not METHODS[request.method].takes_teachers:
        able = ", ".join(name for name, method in METHODS.items() if method.takes_teachers)
        raise InputError(
            f"{request.method} makes its images from one model alone, got "
            f"{len(request.teachers)} more in --teachers; use --method {able}."
        )


def suggest_config(method: str, effort: str, *, maps: bool = False) -> Any:
    """The hyper-parameters of a method for an effort.

    Args:
        method: a key of :data:`dfq.methods.METHODS`.
        effort: ``quick``, ``default``, ``full`` or ``paper``.
        maps: for a model that gives maps, without classes.

    Raises:
        InputError: there is no such method or effort, or the method needs classes.
    """
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; choose from {', '.join(METHODS)}.")
    efforts = METHODS[method].maps if maps else METHODS[method].efforts
    if efforts is None:
        able = ", ".join(name for name, each in METHODS.items() if each.maps is not None)
        raise InputError(
            f"{method} needs classes, and none were given; give their number, or for a model that "
            f"gives maps choose from {able}."
        )
    if effort not in efforts:
        raise InputError(f"{method} has no effort {effort!r}; choose from {', '.join(efforts)}.")
    return efforts[effort]


def resolve_device(name: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:N``; ``auto`` takes a GPU if there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"there is no device {name!r}; write auto, cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"the device {name} is not here (torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs); use --device cpu."
        )
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"dfq runs on cpu and cuda, got device {name!r}; use one of them.")
    return name
