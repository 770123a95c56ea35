"""Real images, for evaluation only: ``.npz`` files and folders of images.

Only ``dfq.evaluate`` imports this module (a test guards it): nothing read here reaches training.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dfq.types import DataSpec, InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
CROP = 0.875  # of the shorter side, as ImageNet models are evaluated (224 out of 256)


class Batch(NamedTuple):
    """Pixels [B, H, W, C] uint8 and labels [B] int64."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def check(path: str | Path, data: DataSpec) -> int:
    """Count the images of ``path`` and refuse what does not fit ``data``; keeps no pixels.

    Raises:
        InputError: the file is missing or corrupt, or its shape, dtype or labels are wrong.
    """
    path = Path(path)
    if not data.classes:
        raise InputError(
            "images with labels measure top-1, and a model without classes has none; leave out "
            "--eval and measure the student and its packed form with what decodes the maps."
        )
    if path.is_dir():
        return sum(len(files) for files in _folders(path, data))
    if not path.is_file():
        raise InputError(f"there is no evaluation file {path}; check --eval.")
    if path.suffix != ".npz":
        raise InputError(f"--eval reads a .npz file or a folder of images, got {path}.")
    return _check_npz(path, data)


def batches(path: str | Path, data: DataSpec, batch_size: int) -> Iterator[Batch]:
    """Yield the images of a path that :func:`check` accepted, in a fixed order."""
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path, data, batch_size)
        return
    with np.load(path, allow_pickle=False) as archive:
        pixels, labels = archive["x"], archive["y"].astype(np.int64)
    for start in range(0, len(labels), batch_size):
        stop = start + batch_size
        yield Batch(pixels[start:stop], labels[start:stop])


def _check_npz(path: Path, data: DataSpec) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {broken}")
            shape, dtype = _header(archive, "x.npy")
            _header(archive, "y.npy")
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["y"]
    except KeyError:
        raise InputError(
            f"{path} must hold x (uint8 [N, H, W, C]) and y (int64 [N]), and lacks one of them; "
            "save it with numpy.savez(FILE, x=..., y=...)."
        ) from None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise InputError(
            f"the evaluation file {path} is corrupt ({error}); get it again."
        ) from error
    _check_pixels(path, shape, dtype, data)
    _check_labels(path, labels, shape[0], data.classes)
    return int(shape[0])


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an array in an ``.npz``, without reading the array."""
    with archive.open(name) as file:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _check_pixels(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], data: DataSpec) -> None:
    channels, height, width = data.shape
    wanted = [height, width, channels]
    if dtype != np.uint8:
        raise InputError(f"x in {path} is {dtype} and must be uint8 (0..255, not normalized).")
    if len(shape) != 4 or list(shape[1:]) != wanted:
        raise InputError(
            f"x in {path} is {list(shape)} and must be [N, {height}, {width}, {channels}] for "
            f"--shape {channels},{height},{width}; images come as [N, H, W, C]."
        )
    if shape[0] == 0:
        raise InputError(f"{path} holds no images; give at least one.")


def _check_labels(path: Path, labels: NDArray[Any], count: int, classes: int) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"y in {path} is {labels.dtype} {list(labels.shape)} and must be int64 [{count}], "
            "one label for each image of x."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"the labels in {path} run from {low} to {high} and must lie in 0..{classes - 1} "
            f"for {classes} classes; check --classes."
        )


def _folders(path: Path, data: DataSpec) -> list[list[Path]]:
    """Image files of each class folder, both sorted by name."""
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if len(classes) != data.classes:
        raise InputError(
            f"{path} holds {len(classes)} class folders and must hold {data.classes}, one for "
            "each class in the order of their names; check --eval and --classes."
        )
    files = [
        sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES) for folder in classes
    ]
    if not any(files):
        raise InputError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}); check --eval.")
    if data.shape[0] not in (1, 3):
        raise InputError(
            f"image folders are read as 1 or 3 channels, but shape has {data.shape[0]}; "
            "give a .npz file."
        )
    _pillow()
    return files


def _read_folder(path: Path, data: DataSpec, batch_size: int) -> Iterator[Batch]:
    labelled = [(f, label) for label, files in enumerate(_folders(path, data)) for f in files]
    for start in range(0, len(labelled), batch_size):
        part = labelled[start : start + batch_size]
        pixels = np.stack([_read_image(file, data.shape) for file, _ in part])
        yield Batch(pixels, np.array([label for _, label in part], np.int64))


def _read_image(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """[H, W, C]: as it is if the size fits, else resized and cropped in the middle."""
    channels, height, width = shape
    image_module = _pillow()
    try:
        with image_module.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"the image {path} cannot be read ({error}); remove it.") from error
    if image.size != (width, height):
        ratio = max(width / image.width, height / image.height) / CROP
        size = round(image.width * ratio), round(image.height * ratio)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.resize(size, image_module.Resampling.BILINEAR)
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise InputError(
            "reading image folders needs the package pillow; run: pip install pillow"
        ) from None
    return Image
