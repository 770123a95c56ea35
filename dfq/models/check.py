"""Is this a network that can be quantized without data? Asked before any work is done."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfq.outputs import tensors
from dfq.types import DataSpec, InputError


def check(model: nn.Module, data: DataSpec) -> None:
    """Refuse a model (on the CPU, in eval mode) that cannot be quantized without data.

    Raises:
        InputError: a NaN or infinite weight, no BatchNorm with running statistics, a shape
            that the model does not take, or an output that is not [B, classes], or without classes
            not of maps.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            found = "NaN" if torch.isnan(tensor).any() else "inf"
            raise InputError(f"the weight {name} contains {found}; get an intact weight file.")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not any(m.running_mean is not None for m in norms):
        raise InputError(
            "the model has no BatchNorm layer with running statistics (found "
            f"{_norms(model)}), and without data there is nothing else to learn its inputs "
            "from; use a model trained with BatchNorm."
        )
    output = _trial(model, data)
    if data.classes:
        _check_logits(output, data)
    else:
        _check_maps(output)


def _trial(model: nn.Module, data: DataSpec) -> object:
    try:
        with torch.no_grad():
            return model(torch.zeros(2, *data.shape))
    except Exception as error:  # a foreign forward may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"the model does not take images of shape {_joined(data.shape)} ({reason}); "
            "check --shape."
        ) from error


def _check_logits(output: object, data: DataSpec) -> None:
    if not isinstance(output, Tensor):
        raise InputError(
            f"the model returns {type(output).__name__} and must return one tensor of logits "
            f"[B, {data.classes}]; wrap it in a module that does."
        )
    if list(output.shape) == [2, data.classes]:
        return
    if output.dim() == 2:
        raise InputError(
            f"the model has {output.shape[1]} outputs but classes is {data.classes}; "
            "check --classes."
        )
    raise InputError(
        f"the model returns {list(output.shape)} for 2 images and must return logits "
        f"[2, {data.classes}]; wrap it in a module that does."
    )


def _check_maps(output: object) -> None:
    if isinstance(output, Tensor) and output.dim() == 2:
        raise InputError(
            f"the model returns {list(output.shape)} for 2 images, the logits of "
            f"{output.shape[1]} classes; give --classes {output.shape[1]}."
        )
    try:
        maps = tensors(output)
    except TypeError as error:
        raise InputError(
            f"the model returns {error} and, without classes, must return tensors [B, C, ...], one "
            "or several in tuples, lists or dicts; wrap it in a module that does."
        ) from None
    for found in maps:
        if found.dim() < 3 or len(found) != 2 or not found.is_floating_point():
            raise InputError(
                f"the model returns {found.dtype} {list(found.shape)} for 2 images and, without "
                "classes, must return float maps [2, C, ...], as they are before decoding; wrap it "
                "in a module that does."
            )


def _norms(model: nn.Module) -> str:
    names = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
    return ", ".join(names) or "no normalization layer"


def _joined(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
