"""``dfq synthesize``: models in, a file of images out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from dfq.cli.flags import (
    Classes,
    Mean,
    Model,
    Name,
    Shape,
    Std,
    Teachers,
    data_spec,
    parse_with_config,
)
from dfq.models import load
from dfq.pipeline import Request, parse_teacher, resolve_synthesis, synthesize
from dfq.report.display import progress


@dataclass(frozen=True)
class SynthesizeFlags:
    """Make images of what trained CNNs remember, from which any method and model can learn.

    The flags of the method's own come last: another --method or --effort brings others.
    """

    model: Model
    """cifar:resnet20, torchvision:NAME, timm:NAME, package.module:function or file.py:function"""
    shape: Shape
    """channels, height and width of the images it takes"""
    out: Annotated[Path, arg(metavar="FILE.npz")]
    """file for the images; dfq quantize --images FILE.npz learns from them"""
    classes: Classes = 0
    """number of classes"""
    weights: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: those of the MODEL)")
    ] = None
    """.safetensors, .pt, .pth, .th or .tar; nothing in it is executed"""
    mean: Mean = ""
    """per-channel mean that was subtracted from images in 0..1"""
    std: Std = ""
    """per-channel standard deviation that they were divided by"""
    images: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: as many as the method makes)")
    ] = None
    """number of images"""
    teachers: Teachers = dataclasses.field(default_factory=list)
    """lis, recipe: further models to make images from; @MEAN/STD behind one that has its own"""
    method: Name = "lis"
    """how images are made: gdfq, genie, lis or recipe"""
    effort: Name = "default"
    """quick, default, full or paper: the method's numbers below"""
    seed: int = 0
    """same seed, same machine: the same images, bit for bit"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:1"""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: torch's)")] = None
    """of the CPU; fewer are faster where other programs run as well"""
    overwrite: bool = False
    """replace that file"""


def synthesize_command(argv: Sequence[str]) -> int:
    """Make images and keep them."""
    flags, config = parse_with_config(SynthesizeFlags, "synthesize", argv)
    data = data_spec(flags)
    request = Request(
        method=flags.method,
        config=config,
        effort=flags.effort,
        seed=flags.seed,
        device=flags.device,
        threads=flags.threads,
        teachers=tuple(map(parse_teacher, flags.teachers)),
        out=flags.out,
        overwrite=flags.overwrite,
    )
    resolve_synthesis(request, data, flags.images)  # mistakes in flags before the model is built
    teacher = load(flags.model, data, flags.weights)
    with progress(Console(stderr=True)) as report:
        images = synthesize(teacher, data, request, count=flags.images, report=report)
    print(f"Wrote {len(images.images)} images by {flags.method} to {flags.out}.")
    return 0
