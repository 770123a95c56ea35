"""The exported graph gives in ONNX Runtime what the packed model gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dfq.deploy import export_onnx, freeze
from dfq.models import build
from dfq.prepare import calibrate, prepare
from dfq.types import InputError
from tests.deploy.nets import NETS
from tests.deploy.test_freeze import IMAGE, images, student_of


def _run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@pytest.mark.parametrize("int4", [False, True], ids=["INT8", "INT4"])
@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w2a3"])
@pytest.mark.parametrize("name", NETS)
def test_the_exported_graph_computes_what_the_packed_model_does(tmp_path, name, bits, int4):
    packed = freeze(student_of(name, bits), IMAGE)
    export_onnx(packed, tmp_path / "m.onnx", int4=int4)
    for x in (images(), images()[:1]):  # the batch is open
        found, expected = _run(tmp_path / "m.onnx", x), packed(x)
        # between 8-bit codes the bias lies on the grid of the sums, which moves some by one
        largest = expected.abs().max()
        assert (found - expected).abs().mean() <= 0.002 * largest
        torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * largest.item())


@pytest.mark.parametrize("name", ["depthwise", "plain"])
def test_protocol_gdfq_and_asymmetric_weights(tmp_path, name):
    packed = freeze(student_of(name, protocol="gdfq", scales="minmax"), IMAGE)
    export_onnx(packed, tmp_path / "m.onnx")
    found, expected = _run(tmp_path / "m.onnx", images()), packed(images())
    assert (found - expected).abs().mean() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize(("bits", "fused"), [("w4a4", [0, 3]), ("w8a8", [0, 1, 3])])
def test_activations_are_quantized_before_every_layer(tmp_path, bits, fused):
    """Between 8-bit codes the bias is on the grid of the sums too: what ONNX Runtime fuses."""
    export_onnx(freeze(student_of("residual", bits), IMAGE), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    writers = {output: node.op_type for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 6
    for layer in layers:
        assert {writers[name] for name in layer.input} == {"DequantizeLinear"}
    assert [i for i, layer in enumerate(layers) if len(layer.input) == 3] == fused


def test_integer_operators_run_in_onnx_runtime(tmp_path):
    export_onnx(freeze(student_of("depthwise", "w8a8"), IMAGE), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearConv") >= 2


@pytest.mark.parametrize(
    ("bits", "kinds"),
    [("w8a8", ["uint8"] * 4), ("w4a8", ["uint8", "int8", "int8", "uint8"])],
)
def test_two_products_fit_16_bits_or_are_of_bytes_of_one_kind(tmp_path, bits, kinds):
    """Where a CPU adds them in int16, ONNX Runtime lets sums of mixed bytes saturate."""
    export_onnx(freeze(student_of("plain", bits), IMAGE), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    writers = {output: node for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    for layer, kind in zip(layers, kinds, strict=True):
        (_, _, zero), (weight, *_) = (writers[name].input for name in layer.input[:2])
        assert (stored[zero].dtype, stored[weight].dtype) == (np.uint8, kind)
        assert kind == "uint8" or 2 * 255 * np.abs(stored[weight].astype(int)).max() <= 32767


@pytest.mark.parametrize("int4", [False, True])
def test_weights_are_stored_as_integers(tmp_path, int4):
    export_onnx(freeze(student_of("residual"), IMAGE), tmp_path / "m.onnx", int4=int4)
    kinds = {}
    for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer:
        if len(tensor.dims) == 4:
            kinds.setdefault(onnx.TensorProto.DataType.Name(tensor.data_type), []).append(tensor)
    expected = {"UINT8": 1, "INT4" if int4 else "INT8": 4}  # the first layer has 8 bits
    assert {kind: len(tensors) for kind, tensors in kinds.items()} == expected


def test_every_constant_is_read(tmp_path):
    student = prepare(build("cifar:resnet20", 10).eval(), "w4a4")  # its shortcuts pad integers
    calibrate(student, images())
    export_onnx(freeze(student, IMAGE), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    read = {name for node in graph.node for name in node.input}
    assert {constant.name for constant in graph.initializer} <= read


def test_a_channel_that_batch_norm_switches_off_keeps_its_bias(tmp_path):
    student = student_of("plain")
    with torch.no_grad():
        student.norm.weight[0] = 0
        student.norm.weight[1] = 1e-30
        student.norm.weight[2].neg_()
    packed = freeze(student, IMAGE)
    export_onnx(packed, tmp_path / "m.onnx")
    found, expected = _run(tmp_path / "m.onnx", images()), packed(images())
    assert (found - expected).abs().mean() <= 0.01 * expected.abs().max()


def test_what_onnx_lacks_is_named(tmp_path):
    packed = freeze(student_of("dense"), IMAGE)
    step = next(step for step in packed.program.steps if step.op == "call")
    step.numbers["function"] = "conv2d"
    with pytest.raises(InputError, match="conv2d, for which this dfq writes no"):
        export_onnx(packed, tmp_path / "m.onnx")
    assert not np.any([path.suffix == ".onnx" for path in tmp_path.iterdir()])
