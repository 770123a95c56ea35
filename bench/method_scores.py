"""What a finished run is worth: top-1, or what a function of the caller's says of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dfq.evaluate import evaluate
from dfq.models.build import find_module
from dfq.pipeline import Request, Run, quantized_models
from dfq.pipeline.conditions import reproducible
from dfq.types import DataSpec, InputError

FIGURES = ("float", "nearest", "student", "packed")
Score = Callable[[nn.Module], float]  # in percent


def load_score(name: str) -> Score:
    """The function that ``file.py:function`` or ``package.module:function`` names.

    Raises:
        InputError: there is no such file or function, or importing it fails.
    """
    source, _, function = name.rpartition(":")
    try:
        score = getattr(find_module(source), function, None)
    except InputError as error:
        raise InputError(f"--score {name} cannot be loaded: {error}") from error
    if not callable(score):
        raise InputError(f"--score {name}: there is no function {function} in {source!r}.")
    return score


def top1(file: Path, data: DataSpec) -> Score:
    """The accuracy on the images of a file, as ``dfq evaluate`` measures it."""
    return lambda model: evaluate(model, file, data).top1


def scores(
    score: Score, run: Run, teacher: nn.Module, data: DataSpec, request: Request
) -> dict[str, float]:
    """What ``score`` gives for each of ``FIGURES``, in eval mode and without gradients."""
    with reproducible(request.threads), torch.no_grad():
        models = {"float": teacher, **quantized_models(run, teacher, data, request)}
        return {name: float(score(models[name].eval())) for name in FIGURES}
