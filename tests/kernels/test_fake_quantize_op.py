"""fake_quantize as a PyTorch op: opcheck, compile, export, and the errors of a caller."""

import pytest
import torch
from fake_quantize_cases import EVERYTHING

from dfq_kernels import _backend, fake_quantize


def _op_arguments():
    x = torch.randn(2, 5, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    per_channel = (torch.rand(5) + 0.1, torch.randint(-2, 2, (5,)).float(), -8, 7, 1, 0.0, None)
    per_tensor = (torch.tensor([0.1]), torch.zeros(1), 0, 15, None, 0.5, torch.tensor([3]))
    return {
        "per-channel": (x.clone().requires_grad_(), *per_channel),
        "channels_last": (last, *per_channel),
        "sliced bf16": (x[:, :, ::2, 1:].bfloat16(), *per_tensor),
    }


@pytest.mark.parametrize("case", ["per-channel", "channels_last", "sliced bf16"])
def test_opcheck(case):
    args = _op_arguments()[case]
    torch.library.opcheck(torch.ops.dfq.fake_quantize.default, args)
    grad = torch.randn(args[0].shape).to(args[0].dtype)
    inputs = (grad, args[0].detach(), *args[1:])
    for needs in (EVERYTHING, (False, True, False)):
        torch.library.opcheck(torch.ops.dfq.fake_quantize_backward.default, (*inputs, *needs))


class _Quantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.1, 0.2]))
        self.register_buffer("zero_point", torch.zeros(2))

    def forward(self, x):
        return fake_quantize(torch.relu(x), self.scale, self.zero_point, 0, 15, axis=1) * 2


def test_compile_in_one_graph():
    module, x = _Quantizer(), torch.randn(3, 2, 4, requires_grad=True)
    inputs = (x, module.scale)
    eager = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)
    ours = torch.autograd.grad(compiled.sum(), inputs)
    for a, b in zip(torch.autograd.grad(eager.sum(), inputs), ours, strict=True):
        assert torch.equal(a, b)


def test_export_holds_the_op():
    module, x = _Quantizer(), torch.randn(3, 2, 4)
    exported = torch.export.export(module, (x,))
    assert torch.ops.dfq.fake_quantize.default in {node.target for node in exported.graph.nodes}
    assert torch.equal(exported.module()(x), module(x))


def test_differentiating_twice_is_refused():
    x = torch.randn(4, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    y = fake_quantize(x, scale, torch.zeros(1), -8, 7)
    (dscale,) = torch.autograd.grad(y.sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(dscale, x)


X, ONE, ZERO, SEED = torch.ones(4, 3), torch.ones(1), torch.zeros(1), torch.tensor([1])
MISTAKES = {
    "dtype": ((X.double(), ONE, ZERO, -8, 7), {}, "got torch.float64"),
    "axis": ((X, ONE, ZERO, -8, 7), {"axis": 2}, "has 2, got 2"),
    "scale shape": ((X, torch.ones(4, 1), ZERO, -8, 7), {"axis": 0}, r"got .* \[4, 1\]"),
    "scale dtype": ((X, ONE.double(), ZERO, -8, 7), {}, r"scale must be float32 of shape \[1\]"),
    "zero_point": ((X, torch.ones(4), ZERO, -8, 7), {"axis": 0}, r"zero_point must .* \[4\]"),
    "bounds": ((X, ONE, ZERO, 7, 7), {}, "got 7 and 7"),
    "wide bounds": ((X, ONE, ZERO, 0, 2**21), {}, "2097152"),
    "drop": ((X, ONE, ZERO, -8, 7), {"drop": 1.5, "seed": SEED}, "from 0 to 1, got 1.5"),
    "no seed": ((X, ONE, ZERO, -8, 7), {"drop": 0.5}, "got none"),
    "seed": ((X, ONE, ZERO, -8, 7), {"drop": 0.5, "seed": ONE}, "got torch.float32"),
    "seed elsewhere": ((X, ONE, ZERO, -8, 7), {"drop": 0.5, "seed": SEED.to("meta")}, "on meta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    args, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        fake_quantize(*args, **options)


def test_the_compiled_op_refuses_what_it_would_misread():
    """Whoever calls torch.ops.dfq directly passes no check in Python."""
    forward, backward = (
        _backend.variant(op, "compiled", "cpu")
        for op in ("fake_quantize", "fake_quantize_backward")
    )
    if forward is None:
        pytest.skip("the compiled kernels are not in this install")
    rest = (-8, 7, 0, 0.0, None)
    with pytest.raises(RuntimeError, match="Float"):
        forward(X, torch.ones(4).double(), torch.zeros(4), *rest)
    with pytest.raises(RuntimeError, match="expected 4 scales and zero points, got 1 and 4"):
        forward(X, ONE, torch.zeros(4), *rest)
    with pytest.raises(RuntimeError, match="gradient's dtype and shape"):
        backward(X.half(), X, torch.ones(4), torch.zeros(4), *rest, *EVERYTHING)
    with pytest.raises(RuntimeError, match="expected float32, float16 or bfloat16"):
        forward(X.double(), torch.ones(4), torch.zeros(4), *rest)
