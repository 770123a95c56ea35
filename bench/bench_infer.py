"""Whole networks on integers against floating point, in channels_last, and torchao's int8.

On a GPU both the integers and the others are one CUDA graph. The weights are those of a network
that nobody trained: they do not change the speed.
"""

import copy
import functools
import importlib.util
import os

import pytest
import torch

from bench.harness import Baseline, Case, compiled, describe
from bench.networks import build, students
from bench.settings import DEVICE, TINY
from dfq.deploy import pack_activations
from dfq.deploy.measure import captured
from dfq_kernels import _backend

NETWORKS = {  # images, aims on a CPU: times as fast as fp32, as bf16, as torchao's int8
    "ResNet-18": ((8, 3, 224, 224), (3, 1.3, None)),
    "MobileNetV1": ((8, 3, 224, 224), (1.5, None, None)),
    "ResNet-20": ((250, 3, 32, 32), (3.5, None, 1)),
}
if DEVICE == "cuda":
    sizes_of = {"ResNet-50": (256, 3, 224, 224), "ResNet-18": (8, 3, 224, 224)}
    NETWORKS = {name: (size, (None,) * 3) for name, size in sizes_of.items()}
if TINY:
    NETWORKS = {"tiny": ((2, 3, 4, 4), (None,) * 3)}
OF_BITS = {"w8a8": True, "w4a8": True, "w4a4": False}  # whether there are aims
TWO_IN_A_BYTE = "w4a4, two in a byte"  # activations too
if DEVICE == "cuda":  # a CPU unpacks them first
    OF_BITS[TWO_IN_A_BYTE] = False
if TINY:
    OF_BITS = {"w8a8": False, TWO_IN_A_BYTE: False}


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    """No TF32 on a GPU, and for each convolution the fastest that cuDNN has."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@functools.cache
def network_of(name):
    images = torch.randn(NETWORKS[name][0], device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    return build(name, images), images


def run_of(model, images):
    run = torch.inference_mode()(functools.partial(model, images))
    return graphed(run) if DEVICE == "cuda" else run


def graphed(run):
    """One CUDA graph for each backend, captured when it first runs."""
    graphs = {}

    def replay():
        backend = _backend._forced
        if backend not in graphs:
            graphs[backend] = captured(run)
        return graphs[backend]()

    return replay


def torchao_int8(network, images):
    """As its documentation lowers a network for x86: one operator a layer, weights packed once."""
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(network, (images,)).module(), quantizer)
        prepared(images)
        lowered = compiled(convert_pt2e(prepared))

    def run():  # another number of threads compiles it anew, so freezing is asked for each time
        with torch.no_grad(), inductor.patch(freezing=True):
            return lowered(images)

    return run


def baselines(name, bits):
    """What is compiled is measured beside the first bits alone: compiling takes a minute.

    On a GPU, whose day is short, beside the first network.
    """
    network, images = network_of(name)
    fp32_aim, bf16_aim, ao_aim = NETWORKS[name][1] if OF_BITS[bits] else (None,) * 3
    half = copy.deepcopy(network).bfloat16()
    found = {
        "fp32": Baseline(run_of(network, images), fp32_aim),
        "bf16": Baseline(run_of(half, images.bfloat16()), bf16_aim),
    }
    if DEVICE == "cuda":
        found["fp16"] = Baseline(run_of(copy.deepcopy(network).half(), images.half()))
    if bits == "w8a8" and (DEVICE == "cpu" or name == next(iter(NETWORKS))):
        whole = compiled(network)
        found["torch.compile"] = Baseline(run_of(whole, images))
        if DEVICE == "cpu" and not TINY and importlib.util.find_spec("torchao"):
            found["torchao int8"] = Baseline(torchao_int8(network, images), ao_aim)
    return found


def sizes(packed, network, folder):
    """Bytes of the two files."""
    path = folder / "m.safetensors"
    packed.save(path)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    return {"file_bytes": os.path.getsize(path), "fp32_bytes": weights}


@pytest.mark.parametrize("bits", OF_BITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_network(measure, tmp_path, name, bits):
    network, images = network_of(name)
    student, packed = students(network, images[:8], bits[:4])
    if bits == TWO_IN_A_BYTE:
        packed = pack_activations(packed)
    size = sizes(packed, network, tmp_path)
    if name == "ResNet-18" and bits == "w4a4":
        assert size["file_bytes"] * 7 <= size["fp32_bytes"]

    def check():
        few = images[:2]
        with torch.no_grad():
            found, expected = packed(few), student(few)
        with _backend.use("reference"):
            torch.testing.assert_close(found, packed(few), rtol=0, atol=0)
        # float rounding moves single activations by one step, which few bits make large
        assert (found - expected).abs().mean() <= 0.05 * expected.abs().max()

    measure(
        Case(
            op="infer",
            name=f"{name}, {bits[:4].upper()}{bits[4:]}",
            size=describe(images),
            run=run_of(packed, images),
            check=check,
            baselines=baselines(name, bits),
            elements=len(images),
            ops=("quantize", "qconv2d", "qlinear"),
            extra=size,
        )
    )
