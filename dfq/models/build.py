"""MODEL strings -> networks as their makers build them, not yet frozen or checked."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dfq.models.cifar import DEPTHS, CifarResNet
from dfq.types import InputError

FORMS = "cifar:resnet20, torchvision:NAME, timm:NAME, package.module:function, file.py:function"


def build(name: str, classes: int, *, pretrained: bool = False) -> nn.Module:
    """Build the network that ``name`` stands for.

    Args:
        name: one of the forms of :data:`FORMS`.
        classes: outputs of a network that is built without pretrained weights; a function of the
            caller's own needs none.
        pretrained: with the weights its library publishes (torchvision and timm; may download).
            A function of the caller's own returns the weights it wants either way.

    Raises:
        InputError: an unknown form or name, a missing library, a function that fails.
    """
    source, separator, rest = name.rpartition(":")
    if not separator or not source or not rest:
        raise InputError(f"MODEL {name!r} is not understood; write one of: {FORMS}.")
    if source in ("cifar", "torchvision", "timm") and not classes and not pretrained:
        raise InputError(f"{name} is built for a number of classes; give --classes.")
    if source == "cifar":
        return _cifar(rest, classes, pretrained)
    if source == "torchvision":
        return _torchvision(rest, classes, pretrained)
    if source == "timm":
        return _timm(rest, classes, pretrained)
    return _call(name, find_module(source), rest)


def _cifar(name: str, classes: int, pretrained: bool) -> nn.Module:
    names = {f"resnet{depth}": depth for depth in DEPTHS}
    if name not in names:
        raise InputError(f"there is no cifar:{name}; choose from {', '.join(names)}.")
    if pretrained:
        raise InputError(
            f"cifar:{name} brings no weights of its own; give --weights FILE, to a teacher "
            f"cifar:{name}=FILE."
        )
    return CifarResNet(names[name], classes)


def _torchvision(name: str, classes: int, pretrained: bool) -> nn.Module:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    if not pretrained:
        return models.get_model(name, weights=None, num_classes=classes)
    return _download(f"torchvision:{name}", lambda: models.get_model(name, weights="DEFAULT"))


def _timm(name: str, classes: int, pretrained: bool) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    if not pretrained:
        return timm.create_model(name, num_classes=classes)
    return _download(f"timm:{name}", lambda: timm.create_model(name, pretrained=True))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(
            f"{name}:... needs the package {name}, which is not installed; run: pip install {name}"
        ) from None
    except Exception as error:  # a build for another torch fails in many ways
        raise InputError(
            f"importing {name} fails ({_reason(error)}); install the {name} that belongs to "
            f"torch {torch.__version__}."
        ) from error


def _unknown(library: str, name: str, names: list[str]) -> InputError:
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"see {library}.list_models()."
    return InputError(f"{library} has no model {name!r}; {hint}")


def _download(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError) as error:  # no network, no such weights
        raise InputError(
            f"the pretrained weights of {name} cannot be had ({_reason(error)}); "
            "give --weights FILE."
        ) from error


def find_module(source: str) -> ModuleType:
    """The module of ``path/file.py`` or ``package.module``, executed.

    Raises:
        InputError: there is none, or executing it fails.
    """
    try:
        if source.endswith(".py"):
            return _from_file(Path(source))
        with _current_folder_on_path():
            return importlib.import_module(source)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        if error.name and source.split(".")[0] == error.name.split(".")[0]:
            raise InputError(f"there is no module {source}; MODEL is one of: {FORMS}.") from None
        raise InputError(
            f"importing {source} needs the package {error.name}; install it."
        ) from error
    except Exception as error:  # the caller's own code may raise anything
        raise InputError(f"importing {source} fails ({_reason(error)}); correct it.") from error


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"there is no file {path}; check MODEL.")
    module = importlib.util.module_from_spec(spec)
    with _current_folder_on_path(path.parent):
        spec.loader.exec_module(module)
    return module


def _call(name: str, module: ModuleType, function: str) -> nn.Module:
    make = getattr(module, function, None)
    if not callable(make):
        raise InputError(f"{name}: the module defines no function {function}; check MODEL.")
    try:
        model = make()
    except Exception as error:  # the caller's own code may raise anything
        raise InputError(f"{name}() fails ({_reason(error)}); correct it.") from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name}() returns {type(model).__name__}; it must return a torch.nn.Module."
        )
    return model


@contextmanager
def _current_folder_on_path(folder: Path = Path()) -> Iterator[None]:
    """A console script does not see modules beside it; ``python -m`` does."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:160]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
