"""``dfq bench``: the speed, size and memory of integer models against their float networks."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dfq.bounds import COUNT
from dfq.cli.bench_table import layer_table, table
from dfq.cli.export import load_packed
from dfq.cli.flags import BenchFlags, image_shape, parse
from dfq.deploy import PackedModel, freeze, speed
from dfq.models import build
from dfq.pipeline import resolve_device
from dfq.prepare import calibrate, prepare
from dfq.types import InputError

EXAMPLE, EXAMPLE_SHAPE = "cifar:resnet20", (3, 32, 32)
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Target:
    """What is measured.

    Attributes:
        name: as it was asked for.
        packed: the integer model.
        image: (channels, height, width).
        make: makes the float network that it was made of, if that is known.
    """

    name: str
    packed: PackedModel
    image: tuple[int, int, int]
    make: functools.partial[nn.Module] | None


def bench_command(argv: Sequence[str]) -> int:
    """Measure every target and print one table, or JSON."""
    flags = parse(BenchFlags, "bench", argv)
    device = torch.device(resolve_device(flags.device))
    _check(flags)
    threads = flags.threads or torch.get_num_threads()
    before = torch.get_num_threads()
    setting = speed.Setting(device, threads, flags.turns, flags.compile)
    targets = [_target(name, flags) for name in flags.target or [EXAMPLE]]
    try:
        torch.set_num_threads(threads)
        rows = [row for target in targets for row in _measure(target, flags, setting)]
        layers = [row for t in targets if flags.layers for row in _layers(t, flags, setting)]
    finally:
        torch.set_num_threads(before)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts = {"torch": torch.__version__, "device": where, "threads": threads, "turns": flags.turns}
    if flags.json:
        print(json.dumps({**facts, "rows": rows, "layers": layers}, indent=1))
        return 0
    out = Console()
    out.print(table(rows, facts))
    if layers:
        out.print(layer_table(layers))
    return 0


def _check(flags: BenchFlags) -> None:
    COUNT.check(**{"--threads": flags.threads, "--turns": flags.turns})
    if not flags.batch or min(flags.batch) < 1:
        raise InputError(f"--batch takes positive numbers, got {flags.batch}; write e.g. 1,8.")
    if flags.layers and flags.device.startswith("cuda"):
        raise InputError("--layers times single layers on the CPU alone; add --device cpu.")


def _target(name: str, flags: BenchFlags) -> Target:
    """Of a run's folder, a file, or a MODEL string."""
    path, shape = Path(name), image_shape(flags.shape) if flags.shape else None
    if path.is_dir():
        packed = load_packed(path)
        facts = json.loads((path / "result.json").read_text(encoding="utf-8"))
        make = functools.partial(build, facts["model"], facts["data"]["classes"])
        return Target(name, packed, shape or packed.program.image, make)
    if path.suffix == SUFFIX:
        packed = load_packed(path)
        return Target(name, packed, shape or packed.program.image, None)
    if shape is None and name.startswith("cifar:"):
        shape = EXAMPLE_SHAPE
    if shape is None:
        raise InputError(f"{name} is no folder and no {SUFFIX} file, and a MODEL needs --shape.")
    make = functools.partial(build, name, flags.classes)
    student = prepare(make().float().eval().requires_grad_(False), flags.bits)
    calibrate(student, torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    return Target(f"{name} {flags.bits}", freeze(student, shape), shape, make)


def _measure(target: Target, flags: BenchFlags, setting: speed.Setting) -> list[dict[str, Any]]:
    """A row for each batch and each way to run the network."""
    network = target.make().float().eval() if target.make else None
    shapes = [(batch, *target.image) for batch in flags.batch]
    on_cpu = setting.device.type == "cpu"
    peaks = speed.peaks(target.packed, target.make, shapes, setting.threads) if on_cpu else {}
    size = speed.file_bytes(target.packed)
    values = [] if network is None else network.state_dict().values()
    weights = sum(t.nbytes for t in values)
    sizes = {"integers": size, speed.FP32: weights, "bf16": weights // 2, "fp16": weights // 2}
    rows = []
    for index, shape in enumerate(shapes):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        results = speed.compare(target.packed, network, images, setting)
        fp32 = next((r.timing for r in results if r.name == speed.FP32), None)
        for result in results:
            row = {"target": target.name, "batch": shape[0], "name": result.name}
            if result.name in peaks:
                result = dataclasses.replace(result, peak=peaks[result.name][index])
            rows.append(row | _figures(result, shape[0], fp32) | {"file": sizes.get(result.name)})
    return rows


def _figures(result: speed.Result, batch: int, fp32: speed.Timing | None) -> dict[str, Any]:
    figures: dict[str, Any] = {"reason": result.reason, "peak": result.peak}
    if result.timing is None:
        return figures
    seconds = max(result.timing.median, 1e-9)
    return figures | {
        "ms": 1e3 * seconds,
        "ms_p20": 1e3 * result.timing.p20,
        "ms_p80": 1e3 * result.timing.p80,
        "images_per_second": batch / seconds,
        "times_fp32": fp32.median / seconds if fp32 else None,
    }


def _layers(target: Target, flags: BenchFlags, setting: speed.Setting) -> list[dict[str, Any]]:
    network = target.make().float().eval() if target.make else None
    images = torch.randn(flags.batch[-1], *target.image)
    packed = target.packed.to("cpu")
    return [
        {
            "target": target.name,
            "batch": flags.batch[-1],
            "layer": layer.name,
            "shape": list(layer.shape),
            "ms": 1e3 * layer.timing.median,
            "fp32_ms": 1e3 * layer.float_timing.median if layer.float_timing else None,
        }
        for layer in speed.compare_layers(packed, network, images, setting)
    ]
