"""``dfq quantize`` and ``dfq evaluate``: flags in, progress and a table out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from dfq.cli.flags import EvaluateFlags, QuantizeFlags, data_spec, parse, parse_quantize
from dfq.deploy import freeze, freeze_layers
from dfq.evaluate import check as check_evaluation
from dfq.evaluate import evaluate
from dfq.models import load
from dfq.pipeline import (
    Request,
    Source,
    execute,
    load_student,
    parse_teacher,
    resolve,
    resolve_device,
)
from dfq.report.display import accuracy_table, map_table, progress
from dfq.types import DataSpec, InputError


def quantize_command(argv: Sequence[str]) -> int:
    """Quantize a model and say how well it went."""
    flags, config = parse_quantize(argv)
    data = data_spec(flags)
    request = Request(
        bits=flags.bits,
        method=flags.method,
        config=config,
        effort=flags.effort,
        protocol=flags.protocol,
        edge_bits=flags.edge_bits,
        scales=flags.scales,
        seed=flags.seed,
        device=flags.device,
        threads=flags.threads,
        teachers=tuple(map(parse_teacher, flags.teachers)),
        images=flags.images,
        out=flags.out,
        overwrite=flags.overwrite,
        eval_file=flags.eval,
        source=Source(flags.model, flags.weights),
    )
    resolve(request, data)  # mistakes in flags before the model is built or fetched
    teacher = load(flags.model, data, flags.weights)
    errors, out = Console(stderr=True), Console()
    with progress(errors) as report:
        run = execute(teacher, data, request, report)
    if flags.eval:
        out.print(accuracy_table(run.results))
    elif not data.classes:
        out.print(map_table(run.results))
    out.print(_farewell(flags, run.results["seconds"]), highlight=False, soft_wrap=True)
    return 0


def evaluate_command(argv: Sequence[str]) -> int:
    """Measure a run's student or a float model."""
    flags = parse(EvaluateFlags, "evaluate", argv)
    device = resolve_device(flags.device)
    folder = Path(flags.target)
    if folder.is_dir():
        model, data = load_student(folder)
        check_evaluation(flags.eval, data)
        model = _packed(model, data) if flags.packed else model
    else:
        if flags.packed:
            raise InputError(f"--packed is of a run, and {flags.target} is no folder of one.")
        if not flags.shape or not flags.classes:
            raise InputError(
                f"{flags.target} is no folder of a run, and a MODEL needs --shape and --classes; "
                "add them."
            )
        data = data_spec(flags)
        check_evaluation(flags.eval, data)
        model = load(flags.target, data, flags.weights)
    accuracy = evaluate(model.to(torch.device(device)), flags.eval, data)
    print(
        f"top-1 {accuracy.top1:.2f} % on {accuracy.count} images "
        f"(95 % interval {accuracy.low:.1f} .. {accuracy.high:.1f})"
    )
    return 0


def _packed(student: nn.Module, data: DataSpec) -> nn.Module:
    """As the run did it: layer by layer where the graph cannot be told."""
    try:
        return freeze(student, data.shape)
    except InputError:
        return freeze_layers(student)


def _farewell(flags: QuantizeFlags, seconds: dict[str, float]) -> str:
    minutes, rest = divmod(round(seconds["total"]), 60)
    sentences = [f"{flags.bits} by {flags.method} in {minutes} min {rest} s."]
    if not flags.eval:
        remedy = "add --eval FILE" if flags.classes else "without classes there is no top-1"
        sentences.append(f"No accuracy was measured: {remedy}.")
    sentences.append(f"Wrote {flags.out}." if flags.out else "Nothing was written: add --out DIR.")
    return " ".join(sentences)
