"""Synthetic images in a file, from which another method or another model can learn.

images  float32 [N, C, H, W], normalized with ``mean`` and ``std``
labels  int64 [N], the classes that they were made for
mean    float64 [C]
std     float64 [C]
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dfq.synthesize.teachers import normalization, renormalization
from dfq.types import DataSpec, Images, InputError

PARTIAL = ".part"  # what a file is called until it is whole


def write_images(path: Path, images: Images, data: DataSpec) -> None:
    """Write ``images``, normalized as ``data`` says."""
    mean, std = normalization(data)
    arrays = {name: tensor.cpu().numpy() for name, tensor in images._asdict().items()}
    write_whole(path, lambda file: np.savez(file, **arrays, mean=mean, std=std))


def read_images(path: Path, data: DataSpec) -> Images:
    """Read what :func:`write_images` wrote, normalized anew as ``data`` says.

    Raises:
        InputError: the file is missing or corrupt, or its images do not fit ``data``.
    """
    check_images_file(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = (torch.from_numpy(arrays[name]) for name in Images._fields)
            mean, std = (tuple(arrays[name].tolist()) for name in ("mean", "std"))
    except KeyError as error:
        raise InputError(
            f"{path} lacks {error}; give the images.npz of a run or a file of dfq synthesize."
        ) from None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, TypeError) as error:
        raise InputError(f"the image file {path} is corrupt ({error}); make it again.") from error
    _check(path, images, labels, data)
    source = replace(data, mean=mean, std=std)
    if normalization(source) == normalization(data):
        return Images(images, labels)
    factor, offset = renormalization(source, data)
    return Images(images * factor + offset, labels)


def check_images_file(path: Path) -> None:
    """Refuse a file that is not there, before anything is done.

    Raises:
        InputError: see above.
    """
    if not path.is_file():
        raise InputError(f"there is no image file {path}; check --images.")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``path`` and rename: the file is there whole, or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        write(file)
    os.replace(partial, path)


def _check(path: Path, images: Tensor, labels: Tensor, data: DataSpec) -> None:
    wanted = list(data.shape)
    if images.dtype != torch.float32 or images.ndim != 4 or list(images.shape[1:]) != wanted:
        raise InputError(
            f"the images in {path} are {images.dtype} {list(images.shape)} and must be "
            f"torch.float32 [N, {', '.join(map(str, wanted))}]; check --images and --shape."
        )
    if not len(images) or not images.isfinite().all():
        raise InputError(f"{path} holds no images, or some that are not finite; make it again.")
    fits = labels.dtype == torch.int64 and list(labels.shape) == [len(images)]
    last = max(data.classes - 1, 0)  # zeros, where there are no classes
    if not fits or labels.min() < 0 or labels.max() > last:
        raise InputError(
            f"the labels in {path} must be int64 [{len(images)}] in 0..{last}; check --images and "
            "--classes."
        )
