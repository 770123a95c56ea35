"""A packed model for other runtimes: ``.onnx``, or ``.pt2`` of ``torch.export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.deploy.onnx_graph import export_onnx
from dfq.deploy.packed import PackedModel
from dfq.types import InputError

SUFFIXES = (".onnx", ".pt2")


def export(model: PackedModel, path: str | Path, *, int4: bool = False) -> None:
    """Write ``model`` as ``.onnx`` or ``.pt2``, as ``path`` ends.

    Args:
        model: from ``freeze`` or ``load``.
        path: of the file.
        int4: of ``.onnx``: store weights of at most 4 bits as INT4 and not as INT8.

    Raises:
        InputError: another ending, or what :func:`export_onnx` refuses.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} must end in {' or '.join(SUFFIXES)}, which says the format.")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} is not there; make it first.")
    if path.suffix == ".onnx":
        export_onnx(model, path, int4=int4)
        return
    if int4:
        raise InputError("int4 is of ONNX; a .pt2 has 4-bit weights two in a byte as it is.")
    export_pt2(model, path)


def export_pt2(model: PackedModel, path: str | Path) -> None:
    """Write ``model`` to a ``.pt2`` file; the batch stays open, height and width do not.

    ``torch.export.load(path).module()`` gives the bits of ``model``, after ``import dfq_kernels``,
    whose ops it calls. The file has the weights once, as they are saved; so what comes back lays
    them out for the CPU's kernels in every call, and a packed model once.
    """
    device = next((t.device for t in model.buffers()), torch.device("cpu"))
    images = torch.zeros(2, *model.program.image, device=device)
    batch = {"images": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(_Plain(model), (images,), dynamic_shapes=batch)
    program.example_inputs = None  # or they would be in the file
    torch.export.save(program, path)


class _Plain(nn.Module):
    """The steps, one after the other, of weights as they are stored."""

    def __init__(self, model: PackedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.execute(images, self.model.bind(prepacked=False))
