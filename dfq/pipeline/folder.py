"""The folder of a run: who may write to it, how its files are written, how a student comes back.

result.json        accuracies, seconds, seed, versions, the whole configuration; written last
metrics.jsonl      losses and measures every few steps
images.npz         the synthetic images, see :mod:`dfq.pipeline.images`
model.safetensors  the student's state_dict, and in its header what rebuilds the network
packed.safetensors the student as integers, for :func:`dfq.load`; if its graph can be traced
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dfq.models import build
from dfq.pipeline.images import PARTIAL, write_images, write_whole
from dfq.prepare import prepare
from dfq.types import DataSpec, Images, InputError

FORMAT = 1  # of the header of model.safetensors
RESULT, METRICS, IMAGES = "result.json", "metrics.jsonl", "images.npz"
MODEL, PACKED = "model.safetensors", "packed.safetensors"
# two runs with equal values of these are the same run and give the same student
GRID = ("data", "bits", "protocol", "edge_bits", "scales")
IDENTITY = (
    *("teacher_sha256", "teachers_sha256", "images_sha256"),
    *GRID,
    *("method", "config", "seed"),
)
REBUILDS = ("model", *GRID)  # what load_student() needs to know


def require_safetensors() -> None:
    """Refuse to go on without the package that writes and reads the student.

    Raises:
        InputError: safetensors is not installed.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise InputError(
            "writing and reading runs needs the package safetensors; run: pip install safetensors"
        )


def check(folder: Path, request: dict[str, Any], overwrite: bool) -> None:
    """Refuse a folder that cannot be written, or that holds another run; writes nothing.

    Raises:
        InputError: see above, or safetensors is not installed.
    """
    require_safetensors()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{existing} is a file, not a folder; give another --out.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"the folder {existing} cannot be written; give another --out.")
    result = folder / RESULT
    if overwrite or not result.exists():
        return
    try:
        finished = json.loads(result.read_text(encoding="utf-8"))
    except ValueError:
        finished = {}
    wanted = json.loads(json.dumps(request))
    other = [key for key in IDENTITY if finished.get(key) != wanted.get(key)]
    if other:
        raise InputError(
            f"{folder} holds a finished run with another {', '.join(other)}; "
            "give another --out or add --overwrite."
        )


def write_result(folder: Path, results: dict[str, Any]) -> None:
    """Give metrics.jsonl its name and write result.json, which says that all files are whole."""
    growing = growing_metrics(folder)
    if growing.exists():
        os.replace(growing, folder / METRICS)
    text = json.dumps(results, indent=2) + "\n"
    write_whole(folder / RESULT, lambda file: file.write(text.encode()))


def write_student(
    folder: Path, student: nn.Module, images: Images, request: dict[str, Any]
) -> None:
    """Write images.npz and model.safetensors.

    Whatever result.json was there is removed first: it would speak of other files.
    """
    from safetensors.torch import save

    header = {"format": FORMAT, **{key: request[key] for key in REBUILDS}}
    # clones, since safetensors refuses tensors that share memory
    state = {
        name: t.detach().cpu().clone().contiguous() for name, t in student.state_dict().items()
    }
    content = save(state, {"dfq": json.dumps(header)})
    (folder / RESULT).unlink(missing_ok=True)
    write_images(folder / IMAGES, images, DataSpec(**request["data"]))
    write_whole(folder / MODEL, lambda file: file.write(content))


def growing_metrics(folder: Path) -> Path:
    """The name of metrics.jsonl while it grows."""
    return folder / (METRICS + PARTIAL)


def load_student(folder: Path) -> tuple[nn.Module, DataSpec]:
    """Rebuild the student of a run from its model.safetensors.

    Raises:
        InputError: no run in the folder, or one that was made from a model object.
    """
    path = folder / MODEL
    if not path.is_file():
        raise InputError(f"{folder} holds no {MODEL}, so no finished run; check the folder.")
    found, state = _read_model(path)
    if found["model"] is None:
        raise InputError(
            f"{path} was made from a model object, not a MODEL string, so the network is "
            "unknown here; prepare your model with its bits and load the state_dict yourself."
        )
    data = DataSpec(
        tuple(found["data"]["shape"]),
        found["data"]["classes"],
        tuple(found["data"]["mean"]),
        tuple(found["data"]["std"]),
    )
    model = build(found["model"], data.classes).float().eval()
    student = prepare(
        model,
        found["bits"],
        protocol=found["protocol"],
        edge_bits=found["edge_bits"],
        scales=found["scales"],
        data=data,
    )
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit {found['model']}, which has changed since; restore it."
        ) from error
    return student.eval(), data


def _read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["dfq"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is corrupt ({error}); run dfq quantize again.") from error
    except KeyError:
        raise InputError(f"{path} was not written by dfq; give the folder of a run.") from None
    if found["format"] != FORMAT:
        raise InputError(
            f"{path} has format {found['format']} and this dfq reads {FORMAT}; update dfq."
        )
    return found, state
