"""The speed of an integer model against the float network that it was made of."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.deploy.measure import (
    Run,
    Subject,
    Timing,
    captured,
    on_cpu,
    on_gpu,
    peak_bytes,
    resident_bytes,
)
from dfq.deploy.packed import PackedModel, load
from dfq.deploy.program import INPUT

FP32 = "fp32"
HALVES = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
NAMES = {torch.float32: FP32, torch.bfloat16: "bf16", torch.float16: "fp16"}
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        device: where.
        threads: of the CPU.
        turns: how often.
        compiled: whether torch.compile is measured too.
    """

    device: torch.device
    threads: int
    turns: int = 7
    compiled: bool = True


@dataclass(frozen=True)
class Result:
    """One way to run a network; times are seconds of one batch, sizes bytes.

    Attributes:
        timing: of a batch; None if it could not run.
        reason: why it could not.
        peak: what the process took beyond itself: weights, activations, the images.
    """

    name: str
    timing: Timing | None = None
    reason: str = ""
    peak: int | None = None


def compare(
    packed: nn.Module, network: nn.Module | None, images: Tensor, setting: Setting
) -> list[Result]:
    """Time ``packed`` beside ``network``, if there is one, in float32, compiled, and in 16 bits.

    Everything runs in channels_last and without gradients. On a GPU each also tells its memory.
    """
    images = images.to(setting.device).contiguous(memory_format=torch.channels_last)
    runs, refused = _runs(packed, network, images, setting)
    if setting.device.type == "cpu":
        subjects = {name: Subject(run) for name, run in runs.items()}
        times = on_cpu(subjects, threads=setting.threads, turns=setting.turns, runs=1)
        return [Result(name, timing) for name, timing in times.items()] + refused
    return [_on_gpu(name, run) for name, run in runs.items()] + refused


def _runs(
    packed: nn.Module, network: nn.Module | None, images: Tensor, setting: Setting
) -> tuple[dict[str, Run], list[Result]]:
    """Those that work, and why others do not."""
    device, refused = setting.device, list[Result]()
    packed = packed.to(device)
    runs = {"integers": _run(packed, images)}
    if device.type == "cuda":
        graph = "integers, CUDA graph"
        try:
            runs[graph] = captured(runs["integers"])
        except RuntimeError as error:
            refused.append(Result(graph, reason=_first_line(error)))
    if network is None:
        return runs, refused
    for dtype in (torch.float32, *HALVES[device.type]):
        copied = copy.deepcopy(network).to(device, dtype).eval()
        copied = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        runs[NAMES[dtype]] = _run(copied, images.to(dtype))
        if dtype == torch.float32 and setting.compiled:
            name = "fp32, torch.compile"
            try:
                compiled = _run(torch.compile(copied, dynamic=False), images)
                compiled()
                runs[name] = compiled
            except Exception as error:  # no compiler, or one that fails: in many ways
                refused.append(Result(name, reason=_first_line(error)))
    return runs, refused


def _run(model: Callable[[Tensor], Any], images: Tensor) -> Run:
    return torch.inference_mode()(lambda: model(images))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _on_gpu(name: str, run: Run) -> Result:
    timing = on_gpu(Subject(run))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return Result(name, timing, peak=torch.cuda.max_memory_allocated() - before)


@dataclass(frozen=True)
class Layer:
    """A step of the integer model, and the layer of the float network that it stands for."""

    name: str
    shape: tuple[int, ...]  # of what it writes
    timing: Timing
    float_timing: Timing | None = None  # of the convolution or linear layer alone


def compare_layers(
    packed: PackedModel, network: nn.Module | None, images: Tensor, setting: Setting
) -> list[Layer]:
    """Time every step, and beside those of layers the float layer alone, in float32; on a CPU."""
    images = images.contiguous(memory_format=torch.channels_last)
    layers = iter(_float_layers(network, images) if network is not None else ())
    found, values, runs = [], {INPUT: images}, packed.bind()
    for step, run in zip(packed.program.steps, runs, strict=True):
        inputs = [values[name] for name in step.inputs]
        y = values[step.output] = run(*inputs)
        subjects = {"integers": Subject(functools.partial(run, *inputs))}
        name = step.numbers.get("function", step.op)
        if "weight" in step.tensors:
            layer = next(layers, None)
            if layer is not None:
                name, subjects[FP32] = f"{layer[0]} ({name})", Subject(layer[1])
        with torch.inference_mode():
            times = on_cpu(subjects, threads=setting.threads, turns=setting.turns, runs=1)
        found.append(Layer(name, tuple(y.shape), times["integers"], times.get(FP32)))
    return found


def _float_layers(network: nn.Module, images: Tensor) -> list[tuple[str, Run]]:
    """Convolutions and linear layers in the order in which they run."""
    network = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: list[tuple[str, Run]] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def keep(module: Any, inputs: Any, _: Any, name: str = name) -> None:
                forward, x = module.forward, inputs[0]
                found.append((name, lambda: forward(x)))

            module.register_forward_hook(keep)
    with torch.no_grad():
        network(images)
    return found


def peaks(
    packed: PackedModel, build: Make | None, images: Sequence[tuple[int, ...]], threads: int
) -> Mapping[str, list[int | None]]:
    """What each way of running takes of memory on a CPU, for each shape of ``images``.

    Each runs in a process of its own. What counts is the most that lies in memory during a run,
    less what lay there before there was a model; a model is built or loaded before that run.

    Args:
        packed: the integer model.
        build: makes the float network there; it must be a function that pickle can name.
        images: shapes of the batches.
        threads: of the CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        packed.save(path)
        ways: dict[str, tuple[Path | Make, torch.dtype | None]] = {"integers": (path, None)}
        if build is not None:
            ways |= {NAMES[t]: (build, t) for t in (torch.float32, *HALVES["cpu"])}
        found = {}
        for name, way in ways.items():
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                found[name] = pool.submit(_peaks, way, images, threads).result()
        return found


def file_bytes(packed: PackedModel) -> int:
    """Of the file that ``packed.save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        packed.save(path)
        return path.stat().st_size


def _peaks(
    way: tuple[Path | Make, torch.dtype | None], images: Sequence[tuple[int, ...]], threads: int
) -> list[int | None]:
    """In the process of its own."""
    source, dtype = way
    torch.set_num_threads(threads)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what the first product brings with it is not counted
    before = resident_bytes()
    model: Any = load(source) if isinstance(source, Path) else source().eval().to(dtype)
    if dtype is not None:
        model = model.to(memory_format=torch.channels_last)
    found = []
    for shape in images:
        x = torch.zeros(shape, dtype=dtype or torch.float32)
        run = _run(model, x.contiguous(memory_format=torch.channels_last))
        run()
        peak = peak_bytes(run)
        found.append(None if peak is None or before is None else peak - before)
    return found
