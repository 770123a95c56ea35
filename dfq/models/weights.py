"""Weight files -> state_dict, without running a line of code from the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.types import InputError

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".tar")
WRAPPERS = ("state_dict", "model")  # what training scripts call the state_dict in a checkpoint
_NAMED = 3  # how many offending keys an error lists


def read(path: str | Path) -> dict[str, Tensor]:
    """Read a state_dict; unwrap ``state_dict`` or ``model``, strip ``module.``.

    Raises:
        InputError: the file is missing, of an unknown kind, corrupt, needs pickled code, or
            holds no state_dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no weight file {path}; check --weights.")
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"the weight file {path} has an unknown suffix; dfq reads {', '.join(SUFFIXES)}."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _state_dict(content, path)


def load_into(model: nn.Module, path: str | Path, name: str) -> None:
    """Load the weight file ``path`` into ``model``, which the user called ``name``.

    Raises:
        InputError: as :func:`read`, or keys or shapes that do not match.
    """
    state = read(path)
    expected = model.state_dict()
    # counters that old checkpoints lack and that inference does not use
    missing = [k for k in expected if k not in state and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    if missing or unexpected:
        raise InputError(
            f"{path} does not fit {name}: {_listed(missing, 'missing')} and "
            f"{_listed(unexpected, 'unexpected')}; check that these weights belong to {name}."
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise InputError(
                f"{path} does not fit {name}: {key} is {list(value.shape)} in the file and "
                f"{list(expected[key].shape)} in the model; check MODEL and --classes."
            )
    model.load_state_dict(state, strict=False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise InputError(
            f"reading {path} needs the package safetensors; run: pip install safetensors"
        ) from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _corrupt(path, error) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):  # torch's word for a class or function to import
            raise _corrupt(path, error) from error
        raise InputError(
            f"the weight file {path} holds pickled Python objects, which dfq does not run; "
            "save the tensors alone: torch.save(model.state_dict(), FILE)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise _corrupt(path, error) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} holds {type(content).__name__}, not a state_dict; "
            "save it with torch.save(model.state_dict(), FILE)."
        )
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{path} holds no state_dict: its entry {key!r} is {type(value).__name__}, "
                "not a tensor; save it with torch.save(model.state_dict(), FILE)."
            )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _corrupt(path: Path, error: Exception) -> InputError:
    first = str(error).partition("\n")[0].partition(". ")[0][:120]
    reason = first if " " in first else type(error).__name__  # a bare number says nothing
    return InputError(
        f"the weight file {path} is corrupt or no weight file ({reason}); get it again."
    )


def _listed(keys: list[str], what: str) -> str:
    """'2 keys missing (a, b)', with at most three names."""
    if not keys:
        return f"no key {what}"
    names = ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")
    return f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} {what} ({names})"
