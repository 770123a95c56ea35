"""``dfq export``: the integer model of a run, for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dfq.cli.flags import ExportFlags, parse
from dfq.deploy import PackedModel, freeze, load
from dfq.pipeline import load_student
from dfq.pipeline.folder import PACKED
from dfq.types import InputError


def export_command(argv: Sequence[str]) -> int:
    """Write the file and say how large it is."""
    flags = parse(ExportFlags, "export", argv)
    ending = flags.out.suffix.removeprefix(".")
    kinds = ("onnx", "pt2", "safetensors")
    if ending not in kinds or flags.format not in (None, ending):
        wanted = f".{flags.format}" if flags.format else ", ".join(f".{kind}" for kind in kinds)
        raise InputError(f"--out {flags.out} does not end in {wanted}; rename it.")
    if not flags.out.parent.is_dir():
        raise InputError(f"the folder {flags.out.parent} is not there; make it first.")
    if flags.int4 and ending != "onnx":
        raise InputError(f"--int4 is of ONNX; .{ending} has 4-bit weights packed as it is.")
    model = load_packed(Path(flags.target))
    if ending == "safetensors":
        model.save(flags.out)
    else:
        model.export(flags.out, int4=flags.int4)
    print(f"Wrote {flags.out}, {flags.out.stat().st_size / 1e6:.3g} MB.")
    return 0


def load_packed(target: Path) -> PackedModel:
    """The integer model of a run's folder, or of a file.

    Raises:
        InputError: it is neither, or the run's network cannot be rebuilt or told as data.
    """
    if (target / PACKED).is_file():
        return load(target / PACKED)
    if target.is_dir():
        student, data = load_student(target)
        return freeze(student, data.shape)
    if not target.exists():
        raise InputError(
            f"{target} is not there; give the folder of a run, or a file that PackedModel.save "
            "wrote."
        )
    return load(target)
