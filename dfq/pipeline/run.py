"""The whole way from a float model to a quantized student, and what is known about it after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq import deploy
from dfq.deploy import PackedModel
from dfq.evaluate import evaluate
from dfq.methods import METHODS
from dfq.outputs import map_errors
from dfq.pipeline import folder as folders
from dfq.pipeline.conditions import Clock, reproducible
from dfq.pipeline.inputs import Inputs, Teacher, load_inputs
from dfq.pipeline.provenance import commit, file_sha256, state_sha256, versions
from dfq.pipeline.request import Request, resolve
from dfq.prepare import calibrate, describe, prepare
from dfq.report import Recorder
from dfq.types import DataSpec, Images, InputError, Report, silent

# what result.json says first, and null where nothing was measured
MEASURED = (
    *("float_top1", "nearest_top1", "student_top1", "packed_top1"),
    *("agreement", "evaluation", "map_errors"),
)
COMPARED = 16  # synthetic images on which maps are compared


@dataclass
class Run:
    """A finished run.

    Attributes:
        student: the fake-quantized network, trainable further.
        images: the synthetic images it learned from.
        results: what result.json holds.
    """

    student: nn.Module
    images: Images
    results: dict[str, Any]

    def freeze(self) -> PackedModel:
        """The student as integers, for the low-bit kernels; see :func:`dfq.deploy.freeze`.

        Raises:
            InputError: the graph of the model cannot be told, or not be run as data;
                :func:`dfq.deploy.freeze_layers` then still freezes layer by layer.
        """
        channels, height, width = self.results["data"]["shape"]
        return deploy.freeze(self.student, (channels, height, width))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the run folder.

        Raises:
            InputError: the folder cannot be written, or holds another run.
        """
        folder = Path(folder)
        folders.check(folder, self.results, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_models(folder)
        folders.write_result(folder, self.results)

    def _write_models(self, folder: Path) -> None:
        folders.write_student(folder, self.student, self.images, self.results)
        packed = folder / folders.PACKED
        packed.unlink(missing_ok=True)
        try:
            self.freeze().save(packed)
        except InputError as error:
            self.results["warnings"].append(f"there is no {folders.PACKED}: {error}")


def quantize(
    model: nn.Module,
    data: DataSpec,
    bits: str = "w4a4",
    method: str = "recipe",
    *,
    config: Any = None,
    effort: str = "default",
    protocol: str = "brecq",
    edge_bits: int | None = None,
    scales: str = "learned",
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    teachers: Sequence[nn.Module | Teacher] = (),
    images: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    eval_file: str | Path | None = None,
    report: Report = silent,
) -> Run:
    """Quantize ``model`` without data; ``model`` itself stays as it is.

    Args:
        model: a trained CNN with BatchNorm, [B, C, H, W] -> logits [B, classes], or maps: see
            :mod:`dfq.outputs`.
        data: shape, classes and normalization of the images it was trained on.
        bits: of weights and activations, ``w4a4`` and the like, 2 to 8 each.
        method: a key of :data:`dfq.methods.METHODS`.
        config: hyper-parameters of the method; None takes those of ``effort``.
        effort: ``quick``, ``default``, ``full`` or ``paper``.
        protocol: ``brecq`` or ``gdfq``, see :func:`dfq.prepare.prepare`.
        edge_bits: bits of the first and the last layer; None takes the protocol's.
        scales: ``learned`` or ``minmax``, see :func:`dfq.prepare.prepare`.
        seed: same seed, same machine: the same student, bit for bit.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU if there is one.
        threads: of the CPU; None leaves torch's number. Another number sums in another order, so
            the student is another one, of like accuracy.
        teachers: further models of the same classes that the images are made from; for ``lis`` and
            ``recipe``.
        images: the ``images.npz`` of another run or a file of ``dfq synthesize`` to learn from,
            instead of making images.
        out: run folder; None writes nothing.
        overwrite: replace the finished run of another call in ``out``.
        eval_file: ``.npz`` or image folder, measured on once the student is finished.
        report: told of every step.

    Raises:
        InputError: anything above is wrong; nothing was written.
        DivergedError: a loss became NaN or infinite.
    """
    request = Request(
        bits=bits,
        method=method,
        config=config,
        effort=effort,
        protocol=protocol,
        edge_bits=edge_bits,
        scales=scales,
        seed=seed,
        device=device,
        threads=threads,
        teachers=tuple(t if isinstance(t, Teacher) else Teacher(t) for t in teachers),
        images=_path(images),
        out=_path(out),
        overwrite=overwrite,
        eval_file=_path(eval_file),
    )
    return execute(model, data, request, report)


def execute(model: nn.Module, data: DataSpec, request: Request, report: Report = silent) -> Run:
    """Do what ``request`` says; see :func:`quantize`."""
    request = resolve(request, data)
    inputs = load_inputs(model, data, request)
    with reproducible(request.threads):
        results = _facts(inputs, data, request)
        if request.out:
            folders.check(request.out, results, request.overwrite)
        run, clock = _learn(inputs.to(request.device), data, request, results, report)
        if request.out:
            run._write_models(request.out)
        if request.eval_file:
            with clock.stage("evaluate"):
                _measure(run, inputs.model, data, request)
        elif not data.classes:
            with clock.stage("evaluate"):
                _compare_maps(run, inputs.model, data, request)
    results["seconds"] = clock.seconds | {"total": round(sum(clock.seconds.values()), 3)}
    if request.out:
        folders.write_result(request.out, results)
    return run


def _learn(
    inputs: Inputs, data: DataSpec, request: Request, results: dict[str, Any], report: Report
) -> tuple[Run, Clock]:
    """Prepare a student and let the method train it; adds to ``results``."""
    clock = Clock()
    with clock.stage("prepare"):
        student = _prepare(inputs.model, data, request)
    metrics = None
    if request.out:  # nothing was written before this line
        request.out.mkdir(parents=True, exist_ok=True)
        metrics = folders.growing_metrics(request.out)
    rng = torch.Generator().manual_seed(request.seed)  # on the CPU: one seed for every device
    run_method = METHODS[request.method].run
    with clock.stage("method"), Recorder(report, metrics) as recorder:
        options = {"rng": rng, "report": recorder, **inputs.options()}
        student, images = run_method(inputs.model, student, data, request.config, **options)
    results["layers"] = [row._asdict() for row in describe(student)]
    results["images"] = len(images.images)
    results["warnings"] = recorder.warnings
    results["seconds_in_method"] = {k: round(v, 3) for k, v in recorder.seconds.items()}
    return Run(student, images, results), clock


def _facts(inputs: Inputs, data: DataSpec, request: Request) -> dict[str, Any]:
    """What is known of a run before it starts."""
    weights, images = request.source.weights, request.images
    return {
        **dict.fromkeys(MEASURED),
        "model": request.source.model,
        "weights": str(weights) if weights else None,
        "weights_sha256": file_sha256(weights) if weights else None,
        "teacher_sha256": state_sha256(inputs.model),
        "teachers": [teacher.about() for teacher in request.teachers] or None,
        "teachers_sha256": [state_sha256(teacher) for teacher in inputs.teachers] or None,
        "images_file": str(images) if images else None,
        "images_sha256": file_sha256(images) if images else None,
        "data": dataclasses.asdict(data),
        "bits": request.bits,
        "protocol": request.protocol,
        "edge_bits": request.edge_bits,
        "scales": request.scales,
        "method": request.method,
        "effort": request.effort,
        "config": dataclasses.asdict(request.config),
        "seed": request.seed,
        "versions": versions(torch.device(request.device)),
        "commit": commit(),
    }


def _prepare(teacher: nn.Module, data: DataSpec, request: Request) -> nn.Module:
    return prepare(
        teacher,
        request.bits,
        protocol=request.protocol,
        edge_bits=request.edge_bits,
        scales=request.scales,
        data=data,
    )


def _measure(run: Run, teacher: nn.Module, data: DataSpec, request: Request) -> None:
    """Put the accuracies of float, nearest, student and packed into the results of ``run``."""
    assert request.eval_file
    models = {"float": teacher, **quantized_models(run, teacher, data, request)}
    found = {name: evaluate(m, request.eval_file, data) for name, m in models.items()}
    evaluation: dict[str, Any] = {
        "file": str(request.eval_file),
        "images": found["float"].count,
    }
    for name, accuracy in found.items():
        agreement = accuracy.agreement(found["float"])
        evaluation[name] = accuracy.as_dict() | {"agreement": agreement}
        run.results[f"{name}_top1"] = accuracy.top1
    run.results["agreement"] = evaluation["student"]["agreement"]
    run.results["evaluation"] = evaluation


@torch.no_grad()
def _compare_maps(run: Run, teacher: nn.Module, data: DataSpec, request: Request) -> None:
    """Put how far each map is from the float model's on synthetic images into the results."""
    images = run.images.images[:COMPARED]
    wanted = teacher(images)
    models = quantized_models(run, teacher, data, request)
    run.results["map_errors"] = {
        name: map_errors(model(images), wanted) for name, model in models.items()
    }


def quantized_models(
    run: Run, teacher: nn.Module, data: DataSpec, request: Request
) -> dict[str, nn.Module]:
    """What is measured beside the float model: ``nearest``, ``student`` and ``packed``.

    ``nearest`` has the student's bits and has learned nothing, calibrated on the run's images;
    ``packed`` is the student as integers, layer by layer where its graph cannot be told.
    """
    nearest = _prepare(teacher, data, request)
    calibrate(nearest, run.images.images)
    try:
        packed: nn.Module = run.freeze()
    except InputError as error:
        packed = deploy.freeze_layers(run.student)
        run.results["warnings"].append(f"packed layer by layer: {error}")
    return {"nearest": nearest, "student": run.student, "packed": packed}


def _path(path: str | Path | None) -> Path | None:
    return Path(path) if path is not None else None
