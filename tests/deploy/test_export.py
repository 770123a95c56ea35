"""A .pt2 computes what the packed model does, bit for bit, and holds its weights once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dfq.deploy import export, freeze, load
from dfq.prepare import calibrate, prepare
from dfq.types import InputError
from tests.deploy.nets import NETS
from tests.deploy.test_freeze import IMAGE, images, student_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NETS)
def test_it_comes_back_with_the_same_bits(tmp_path, name):
    packed = freeze(student_of(name), IMAGE)
    packed.export(tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for x in (images(), images()[:1], images()[:5].contiguous(memory_format=torch.channels_last)):
        assert torch.equal(loaded(x), packed(x))


def test_it_calls_the_integer_ops(tmp_path):
    packed = freeze(student_of("residual"), IMAGE)
    packed(images())
    packed.export(tmp_path / "m.pt2")
    called = [str(node.target) for node in torch.export.load(tmp_path / "m.pt2").graph.nodes]
    assert called.count("dfq.qconv2d.default") == 5
    assert called.count("dfq.qlinear.default") == 1
    assert not any("convolution" in name or "linear.default" in name[4:8] for name in called)


def test_its_process_needs_the_ops_alone(tmp_path):
    packed = freeze(student_of("plain"), IMAGE)
    packed.export(tmp_path / "m.pt2")
    torch.save((images(), packed(images())), tmp_path / "x.pt")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, dfq_kernels
x, y = torch.load("x.pt", weights_only=True)
assert torch.equal(torch.export.load("m.pt2").module()(x), y)
assert "dfq" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_weights_are_in_the_file_once_and_packed(tmp_path):
    student = prepare(
        nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 512, 3), nn.Conv2d(512, 4, 1)).eval(),
        "w4a4",
    )
    calibrate(student, images())
    packed = freeze(student, IMAGE)
    packed(images())  # weights are laid out for the CPU, which must not reach the file
    packed.export(tmp_path / "m.pt2")
    stored = sum(b.numel() * b.element_size() for b in packed.buffers())
    assert stored < (tmp_path / "m.pt2").stat().st_size < 1.3 * stored


def test_the_ending_says_the_format(tmp_path):
    packed = freeze(student_of("plain"), IMAGE)
    with pytest.raises(InputError, match=r"m.pth must end in .onnx or .pt2"):
        packed.export(tmp_path / "m.pth")
    with pytest.raises(InputError, match="nowhere is not there"):
        export(packed, tmp_path / "nowhere" / "m.pt2")
    with pytest.raises(InputError, match="int4 is of ONNX"):
        export(packed, tmp_path / "m.pt2", int4=True)
    assert not list(tmp_path.iterdir())


def test_what_was_loaded_can_be_exported(tmp_path):
    packed = freeze(student_of("plain"), IMAGE)
    packed.save(tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors").export(tmp_path / "m.pt2")
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(images()), packed(images()))
