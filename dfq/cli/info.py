"""``dfq info``: what is installed, what is missing and how to get it; all standard library."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import dfq
from dfq.types import InputError

OLDEST_TORCH = (2, 10)
PACKAGES = {  # package: (what needs it, how it is installed)
    "numpy": ("everything", "pip install numpy"),
    "torch": ("everything", "pip install torch"),
    "rich": ("dfq quantize, evaluate, bench and demo", "pip install rich"),
    "safetensors": ("run folders and .safetensors weights", "pip install safetensors"),
    "tyro": ("dfq quantize, evaluate, export and bench", "pip install tyro"),
    "onnx": ("dfq export to .onnx", "pip install onnx"),
    "scikit-learn": ("dfq demo", "pip install scikit-learn"),
    "pillow": ("image folders", "pip install pillow"),
    "torchvision": ("torchvision:NAME models", "pip install torchvision"),
    "timm": ("timm:NAME models", "pip install timm"),
    "triton": ("Triton kernels on NVIDIA GPUs", "pip install triton"),
}
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}


def info_command(argv: Sequence[str]) -> int:
    """Print what is installed; ``--check`` compares every kernel backend with the reference."""
    parser = argparse.ArgumentParser(
        prog="dfq info", description="What is installed, what is missing, which kernels run here."
    )
    parser.add_argument(
        "--check", action="store_true", help="compare every kernel backend with the reference"
    )
    flags = parser.parse_args(argv)
    print("\n".join(lines()))
    if not flags.check:
        return 0
    if not _installed("torch"):
        raise InputError("dfq info --check needs torch; run: pip install torch")
    found, agreed = importlib.import_module("dfq.cli.parity").check()
    print("\n".join(["", "Check", *(f"  {line}" for line in found)]))
    return 0 if agreed else 1


def lines() -> list[str]:
    """What ``dfq info`` prints."""
    return [
        f"dfq {dfq.__version__} in {Path(dfq.__file__).parent}",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPUs",
        "",
        "Packages",
        *(f"  {name:13}{_package(name)}" for name in PACKAGES),
        "",
        "Kernels",
        *(f"  {line}" for line in _kernels()),
    ]


def _package(name: str) -> str:
    needed_by, remedy = PACKAGES[name]
    if not _installed(name):
        return f"missing; needed by {needed_by}. Install it with: {remedy}"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed"
    if name == "torch" and _numbers(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"{version} is too old; dfq needs {oldest} or later. Run: pip install -U torch"
    return version


def _kernels() -> list[str]:
    if not _installed("torch"):
        return ["none without torch"]
    try:
        backend = importlib.import_module("dfq_kernels._backend")
    except Exception as error:  # a broken torch fails in many ways, and this is where it is said
        return [f"none: importing torch fails ({type(error).__name__}: {error})"]
    return [
        f"{status.device:5}{status.backend:11}{status.reason or 'available'}"
        for status in backend.report()
    ]


def _installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES.get(name, name)) is not None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
