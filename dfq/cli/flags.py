"""Command-line flags, made from dataclasses by tyro."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dfq.pipeline import suggest_config
from dfq.types import DataSpec, InputError

REGISTRY = ConstructorRegistry()
T = TypeVar("T")


def _word(metavar: str, default: str | None = None) -> Any:
    """How ``--help`` shows a flag: the word for its value, and its default if that is special."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else None)


Model = Positional[Annotated[str, _word("MODEL")]]
Target = Positional[Annotated[str, _word("DIR|MODEL")]]
Shape = Annotated[str, _word("C,H,W")]
Classes = Annotated[int, _word("N", "the model gives maps, not logits")]
Mean = Annotated[str, _word("X,X,X", "zeros")]
Std = Annotated[str, _word("X,X,X", "ones")]
Name = Annotated[str, _word("NAME")]
Teachers = Annotated[list[str], _word("MODEL=WEIGHTS", "none")]


@dataclass(frozen=True)
class QuantizeFlags:
    """Quantize a trained CNN without its data.

    The flags of the method's own come last: another --method or --effort brings others.
    """

    model: Model
    """cifar:resnet20, torchvision:NAME, timm:NAME, package.module:function or file.py:function"""
    shape: Shape
    """channels, height and width of the images it takes"""
    classes: Classes = 0
    """number of classes"""
    weights: Annotated[Path | None, _word("FILE", "those of the MODEL")] = None
    """.safetensors, .pt, .pth, .th or .tar; nothing in it is executed"""
    mean: Mean = ""
    """per-channel mean that was subtracted from images in 0..1"""
    std: Std = ""
    """per-channel standard deviation that they were divided by"""
    bits: Annotated[str, _word("w4a4")] = "w4a4"
    """bits of weights and of activations, 2 to 8 each"""
    method: Name = "recipe"
    """how the student learns"""
    effort: Name = "default"
    """quick, default, full or paper: the method's numbers below"""
    protocol: Literal["brecq", "gdfq"] = "brecq"
    """brecq: first and last layer at 8 bits; gdfq: all alike, activations behind the ReLU"""
    edge_bits: Annotated[int | None, _word("N", "as the protocol says")] = None
    """bits of the first and the last layer"""
    scales: Literal["learned", "minmax"] = "learned"
    """learned with the weights (LSQ), or ranges from minimum to maximum"""
    seed: int = 0
    """same seed, same machine: the same student, bit for bit"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:1"""
    threads: Annotated[int | None, _word("N", "torch's")] = None
    """of the CPU; fewer are faster where other programs run as well"""
    teachers: Teachers = dataclasses.field(default_factory=list)
    """lis, recipe: further models to make images from; @MEAN/STD behind one that has its own"""
    images: Annotated[Path | None, _word("FILE", "make them")] = None
    """synthetic images to learn from: images.npz of a run or a file of dfq synthesize"""
    out: Annotated[Path | None, _word("DIR", "write nothing")] = None
    """folder for the student, its images, result.json and metrics.jsonl"""
    overwrite: bool = False
    """replace a finished run of another command in that folder"""
    eval: Annotated[Path | None, _word("FILE", "measure nothing")] = None
    """real images to measure on when all is done: .npz or a folder of class folders"""


@dataclass(frozen=True)
class EvaluateFlags:
    """Measure the accuracy of a run's student, or of a float model, on real images.

    A run folder knows its network and its data; a MODEL needs --shape and --classes as well.
    """

    target: Target
    """folder that dfq quantize wrote, or a MODEL as dfq quantize takes it"""
    eval: Annotated[Path, _word("FILE")]
    """.npz (x uint8 [N, H, W, C], y int64 [N]) or a folder of class folders"""
    weights: Annotated[Path | None, _word("FILE", "those of the MODEL")] = None
    """of a MODEL: .safetensors, .pt, .pth, .th or .tar; nothing in it is executed"""
    shape: Annotated[str, _word("C,H,W", "the run's")] = ""
    """of a MODEL: channels, height and width of the images it takes"""
    classes: Annotated[int, _word("N", "the run's")] = 0
    """of a MODEL: number of classes"""
    mean: Mean = ""
    """of a MODEL: per-channel mean that was subtracted from images in 0..1"""
    std: Std = ""
    """of a MODEL: per-channel standard deviation that they were divided by"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:1"""
    packed: bool = False
    """of a run: measure the integer model, as it is frozen, and not the student"""


@dataclass(frozen=True)
class ExportFlags:
    """Write the integer model of a run for other programs, or for dfq.load."""

    target: Positional[Annotated[str, _word("DIR|FILE")]]
    """folder that dfq quantize wrote, or a .safetensors file that PackedModel.save wrote"""
    out: Annotated[Path, _word("FILE")]
    """.onnx, .pt2 or .safetensors"""
    format: Annotated[
        Literal["onnx", "pt2", "safetensors"] | None, _word("NAME", "as FILE ends")
    ] = None
    """onnx: QuantizeLinear and DequantizeLinear; pt2: torch.export; safetensors: dfq.load"""
    int4: bool = False
    """of onnx: store weights of at most 4 bits as INT4, which few runtimes are fast with"""


@dataclass(frozen=True)
class BenchFlags:
    """Measure the speed of integer models against the float networks they were made of.

    Each TARGET is a run's folder, a .safetensors file that PackedModel.save wrote (then nothing in
    float is beside it), or a MODEL as dfq quantize takes it, which is not trained for this.
    """

    target: Positional[Annotated[list[str], _word("DIR|FILE|MODEL", "cifar:resnet20")]] = (
        dataclasses.field(default_factory=list)
    )
    """what to measure"""
    batch: Annotated[tuple[int, ...], _word("N,N")] = (1, 8)
    """images at a time"""
    threads: Annotated[int | None, _word("N", "torch's")] = None
    """of the CPU"""
    shape: Annotated[str, _word("C,H,W", "the run's or the file's; of cifar: 3,32,32")] = ""
    """channels, height and width of the images"""
    classes: int = 1000
    """of a MODEL: number of classes"""
    bits: Annotated[str, _word("w4a4")] = "w8a8"
    """of a MODEL: bits of weights and of activations"""
    device: Name = "auto"
    """auto, cpu, cuda or cuda:1"""
    compile: bool = True
    """measure torch.compile too, which takes a minute"""
    layers: bool = False
    """tell the times of all layers as well"""
    turns: int = 7
    """how often each is measured; what is told is the median"""
    json: bool = False
    """print JSON and no table"""


def parse_quantize(argv: Sequence[str]) -> tuple[QuantizeFlags, Any]:
    """Flags of ``dfq quantize`` and the method's config; see :func:`parse_with_config`."""
    return parse_with_config(QuantizeFlags, "quantize", argv)


def parse_with_config(flags: type[Any], command: str, argv: Sequence[str]) -> tuple[Any, Any]:
    """Flags of a command, and the method's config; --method and --effort decide its flags.

    Raises:
        InputError: an unknown method or effort, or a value that the config refuses.
        SystemExit: an unknown flag (2), or --help (0); tyro has printed what to say.
    """
    method = _value(argv, "--method") or flags.method
    effort = _value(argv, "--effort") or flags.effort
    asks = {"-h", "--help"} & set(argv)
    maps = _value(argv, "--classes") in (None, "0") and not asks
    config = suggest_config(method, effort, maps=maps)
    mirror = _mirror(config, arg(prefix_name=False))
    both = dataclasses.make_dataclass(
        "Flags",
        [
            ("run", Annotated[flags, arg(name="")]),
            (method, mirror, dataclasses.field(default=mirror())),
        ],
    )
    parsed = _parse(both, command, flags, argv)
    return parsed.run, _checked(config, getattr(parsed, method))


def parse(kind: type[T], command: str, argv: Sequence[str]) -> T:
    """Flags of a command that are those of a dataclass.

    Raises:
        SystemExit: an unknown flag (2), or --help (0); tyro has printed what to say.
    """
    parsed = _parse(kind, command, kind, argv)
    assert isinstance(parsed, kind)
    return parsed


def data_spec(flags: Any) -> DataSpec:
    """The DataSpec that --shape, --classes, --mean and --std write.

    Raises:
        InputError: they are no numbers, or do not fit together.
    """
    mean, std = _numbers("--mean", flags.mean, float), _numbers("--std", flags.std, float)
    return DataSpec(image_shape(flags.shape), flags.classes, mean, std)


def image_shape(text: str) -> tuple[int, int, int]:
    """Of ``--shape``.

    Raises:
        InputError: it is not three numbers.
    """
    shape = tuple(int(n) for n in _numbers("--shape", text, int))
    if len(shape) != 3:
        raise InputError(f"--shape is channels,height,width, got {text!r}; write e.g. 3,32,32.")
    return shape[0], shape[1], shape[2]


@REGISTRY.primitive_rule
def _comma_separated(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """``--teacher-bits 8,6`` for every tuple of numbers or strings in a config."""
    if get_origin(info.type) is not tuple:
        return None
    kind = get_args(info.type)[0]
    if kind not in (int, float, str):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()},...",
        instance_from_str=lambda words: tuple(kind(word) for word in words[0].split(",") if word),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def _mirror(config: Any, *marks: Any) -> type[Any]:
    """A dataclass with the fields, documentation and values of ``config``, checked by nobody.

    A nested config is mirrored too; ``marks`` annotate the fields of the outer one.
    """
    kinds = get_type_hints(type(config))
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(config):
        kind, value = kinds[field.name], getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            kind = _mirror(value)
            value = kind()
        kind = Annotated[(kind, *marks)] if marks else kind
        fields.append((field.name, kind, dataclasses.field(default=value)))
    mirror = dataclasses.make_dataclass(type(config).__name__, fields, frozen=True)
    mirror.__doc__ = type(config).__doc__
    return mirror


def _checked(config: Any, mirror: Any) -> Any:
    """A config of the kind of ``config``, with the values of its mirror.

    Raises:
        InputError: it refuses one, which is called by its place in a nested config.
    """
    values = {}
    for field in dataclasses.fields(config):
        value, suggested = getattr(mirror, field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(suggested):
            try:
                value = _checked(suggested, value)
            except InputError as error:
                raise InputError(f"{field.name}.{error}") from None
        values[field.name] = value
    return type(config)(**values)


def _parse(flags: type[Any], command: str, documented: type[Any], argv: Sequence[str]) -> Any:
    description = inspect.getdoc(documented)
    with REGISTRY:
        return tyro.cli(flags, prog=f"dfq {command}", description=description, args=list(argv))


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The value of ``flag``, before the flags that depend on it are known."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise InputError(
            f"{flag} takes numbers separated by commas, got {text!r}; write e.g. "
            f"{'3,32,32' if kind is int else '.485,.456,.406'}."
        ) from None
