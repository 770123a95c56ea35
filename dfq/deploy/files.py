"""The file of a packed model: tensors in ``.safetensors``, everything else as JSON in its header.

Integer weights take as many bits as their largest needs, one after the other without gaps, lowest
bit first; in memory they are bytes, or two a byte in blocks (``dfq_kernels.pack_int4``). Where all
are odd, as on a grid without zero, their last bit is left out. A digest tells whether a file is as
it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfq.deploy.program import Program
from dfq.types import InputError
from dfq_kernels import pack_int4, unpack_int4

FORMAT = 2
HEADER = "dfq_packed"
Stored = dict[str, Any]


def write(path: str | Path, program: Program, tensors: Mapping[str, Tensor]) -> None:
    """Write a file, whole or not at all."""
    from safetensors.torch import save

    shapes = _weight_shapes(program)
    stored, packing = {}, {}
    for name, tensor in tensors.items():
        if name in shapes:
            stored[name], packing[name] = squeeze(tensor.cpu(), shapes[name])
        else:
            stored[name] = tensor.cpu().contiguous()
    header = {"format": FORMAT, "program": program.as_dict(), "packing": packing}
    content = save(stored, {HEADER: json.dumps(header | {"sha256": _digest(header, stored)})})
    partial = Path(f"{path}.part")
    partial.write_bytes(content)
    partial.replace(path)


def read(path: str | Path) -> tuple[Program, dict[str, Tensor]]:
    """What ``write`` wrote; nothing in the file is executed.

    Raises:
        InputError: if it is no such file, is damaged, or was written by another version of dfq.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or no model ({error}); freeze and save again."
        ) from error
    except KeyError:
        raise InputError(
            f"{path} was not written by PackedModel.save; give another file."
        ) from None
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{path} has format {found} and this dfq reads {FORMAT}; use the dfq that wrote it, or "
            "freeze and save again."
        )
    program = Program.from_dict(header.get("program", {}))
    try:
        tensors = {name: _expand(t, header["packing"].get(name)) for name, t in stored.items()}
        same = header.pop("sha256") == _digest(header, stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); freeze and save again.") from error
    if not same:
        raise InputError(f"{path} was altered after it was written; freeze and save again.")
    return program, tensors


def squeeze(weight: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Stored]:
    """Integer weights as a row of bytes without gaps, and what ``_expand`` must know.

    Args:
        weight: int8 of ``shape``, or by ``pack_int4``.
        shape: [O, ...].
    """
    four_bits = weight.dtype == torch.uint8
    size = torch.Size(shape[1:]).numel()
    values = (unpack_int4(weight, size) if four_bits else weight).numpy().reshape(-1)
    odd = values.size > 0 and bool((values & 1).all())
    values = values >> 1 if odd else values
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    bits = max(max(-low - 1, 0).bit_length(), max(high, 0).bit_length()) + 1
    each = np.unpackbits(values.view(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    row = torch.from_numpy(np.packbits(each.reshape(-1), bitorder="little"))
    return row, {"bits": bits, "odd": odd, "shape": list(shape), "four_bits": four_bits}


def _expand(stored: Tensor, packing: Stored | None) -> Tensor:
    """A tensor as the model has it in memory."""
    if packing is None:
        return stored
    bits, shape = int(packing["bits"]), torch.Size(packing["shape"])
    if not 1 <= bits <= 8 or stored.shape != ((shape.numel() * bits + 7) // 8,):
        raise ValueError(f"{list(stored.shape)} bytes are not {list(shape)} of {bits} bits")
    each = np.unpackbits(stored.numpy(), count=shape.numel() * bits, bitorder="little")
    codes = np.packbits(each.reshape(-1, bits), axis=1, bitorder="little").reshape(-1)
    half = np.uint8(1 << (bits - 1))
    values = torch.from_numpy(((codes ^ half) - half).view(np.int8)).reshape(shape)
    values = 2 * values + 1 if packing["odd"] else values
    return pack_int4(values.flatten(1)) if packing["four_bits"] else values


def _weight_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Of the integer weights, by the name of their tensor."""
    return {
        step.tensors["weight"]: tuple(step.numbers["shape"])
        for step in program.steps
        if "shape" in step.numbers and "weight" in step.tensors
    }


def _digest(header: Stored, stored: Mapping[str, Tensor]) -> str:
    """Of all that a file says."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(stored):
        tensor = stored[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
