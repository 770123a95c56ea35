"""Compile csrc where torch, a compiler and pybind11 allow; otherwise install pure Python.

What is compiled how is dfq_kernels/build.py, loaded as part of a package of another name: importing
dfq_kernels needs torch, which an isolated build does not have.
"""

import importlib
import sys
import types
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _load_build():
    package = types.ModuleType("dfq_native")
    package.__path__ = [str(ROOT / "dfq_kernels")]
    sys.modules[package.__name__] = package
    return importlib.import_module("dfq_native.build")


build = _load_build()
LIBRARIES, SKIPPED = build.plan(ROOT)


class BuildNative(build_ext):
    """build_ext whose compiler is driven by dfq_kernels/build.py."""

    def get_ext_filename(self, fullname):
        """The file name that build.py gives: _C_cpu.so holds no Python symbols, hence no tag."""
        *package, name = fullname.split(".")
        filenames = {library.name: library.filename for library in LIBRARIES}
        return str(Path(*package, filenames[name]))

    def build_extension(self, ext):
        """Compile one library to where setuptools wants it."""
        library = next(item for item in LIBRARIES if ext.name == f"dfq_kernels.{item.name}")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.compile_library(library, output, ROOT / "build" / "native", ROOT)


for skipped, reason in SKIPPED.items():
    print(f"dfq: skipped dfq_kernels.{skipped}: {reason}", file=sys.stderr)

setup(
    ext_modules=[
        Extension(f"dfq_kernels.{library.name}", list(library.sources)) for library in LIBRARIES
    ],
    cmdclass={"build_ext": BuildNative},
)
