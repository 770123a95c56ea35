"""The command ``dfq``. Starts without torch, so that ``dfq info`` can say what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

import dfq
from dfq.cli.memory import keep_freed_memory
from dfq.types import InputError

HELP = """\
usage: dfq COMMAND ...

Quantize a trained CNN to 2-8 bits without its data.

commands:
  quantize MODEL    make a low-bit student of a float model
  synthesize MODEL  make images of what models remember, for any model to learn from
  evaluate DIR      measure a student or a float model on real images
  export DIR        write the integer model as ONNX, .pt2 or for dfq.load
  bench DIR         measure its speed against the float network
  demo              see it work on a small network, in two minutes
  info              what is installed, what is missing, which kernels run here

dfq COMMAND --help tells what each takes. For example:
  dfq quantize torchvision:resnet18 --shape 3,224,224 --classes 1000 \\
      --mean .485,.456,.406 --std .229,.224,.225 --bits w4a4 --out runs/resnet18
"""
COMMANDS = {  # command: (where it is, packages it needs)
    "quantize": ("dfq.cli.commands:quantize_command", ("torch", "rich", "safetensors", "tyro")),
    "synthesize": ("dfq.cli.synthesize:synthesize_command", ("torch", "rich", "tyro")),
    "evaluate": ("dfq.cli.commands:evaluate_command", ("torch", "rich", "safetensors", "tyro")),
    "export": ("dfq.cli.export:export_command", ("torch", "safetensors", "tyro")),
    "bench": ("dfq.cli.bench:bench_command", ("torch", "rich", "safetensors", "tyro")),
    "demo": ("dfq.demo:demo_command", ("torch", "rich", "sklearn")),
    "info": ("dfq.cli.info:info_command", ()),
}
EXTRAS = {"torch": "torch", "sklearn": "demo"}  # of pyproject.toml; the others are in "cli"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``dfq`` and return its exit code: 0, 1 diverged, 2 wrong input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except BrokenPipeError:  # the reader, e.g. head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as stop:  # tyro has printed what to say
        return stop.code if isinstance(stop.code, int) else 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"dfq {dfq.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise InputError(f"there is no command {words[0]!r}; choose from {', '.join(COMMANDS)}.")
    place, needed = COMMANDS[words[0]]
    _require(words[0], needed)
    keep_freed_memory()
    module, _, function = place.partition(":")
    run = getattr(importlib.import_module(module), function)
    diverged = importlib.import_module("dfq.report").DivergedError
    try:
        return run(words[1:])
    except diverged as error:
        return _fail(str(error), 1)


def _require(command: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(sorted({EXTRAS.get(name, "cli") for name in missing}))
        raise InputError(
            f"dfq {command} needs {', '.join(missing)}, which is not installed; "
            f"run: pip install 'dfq[{extras}]'"
        )


def _fail(sentence: str, code: int) -> int:
    print(f"dfq: {sentence}", file=sys.stderr)
    return code
