"""Which implementation runs: the order, what forcing does, absent against broken."""

import sys

import pytest
import torch

import dfq_kernels
from dfq_kernels import _backend
from dfq_kernels.fake_quantize import (
    fake_quantize,
    fake_quantize_backward_reference,
    fake_quantize_reference,
)

OPS = ["fake_quantize", "fake_quantize_backward"]
ARGS = (torch.ones(1), torch.zeros(1), -8, 7)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("DFQ_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it makes triton run CPU tensors
    _clear()
    yield
    monkeypatch.undo()
    _clear()


def _clear():
    _backend.implementation.cache_clear()
    _backend._load_library.cache_clear()


def _without_library(monkeypatch, tmp_path):
    monkeypatch.setattr(_backend, "_library_path", lambda device: tmp_path / "_C_cpu.so")


@pytest.mark.parametrize("op", OPS)
def test_cpu_prefers_compiled(op):
    compiled = _backend.variant(op, "compiled", "cpu")
    if compiled is None:
        pytest.skip("the compiled kernels are not in this install")
    assert _backend.implementation(op, "cpu") == compiled


def test_absent_library_means_the_reference(monkeypatch, tmp_path):
    _without_library(monkeypatch, tmp_path)
    assert _backend.implementation("fake_quantize", "cpu") is fake_quantize_reference
    backward = _backend.implementation("fake_quantize_backward", "cpu")
    assert backward is fake_quantize_backward_reference
    assert torch.equal(fake_quantize(torch.tensor([0.6]), *ARGS), torch.ones(1))


def test_broken_library_raises(monkeypatch, tmp_path):
    _without_library(monkeypatch, tmp_path)
    (tmp_path / "_C_cpu.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"does not load .* dfq_kernels\.build"):
        fake_quantize(torch.ones(3), *ARGS)
    reasons = {(s.backend, s.device): s.reason for s in _backend.report()}
    assert "does not load" in reasons["compiled", "cpu"]


def test_library_without_the_op_is_absent():
    assert _backend.variant("no_such_op", "compiled", "cpu") is None
    assert _backend.variant("no_such_op", "reference", "cpu") is None


@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_forced_but_missing_is_an_error_with_the_remedy(backend, monkeypatch, tmp_path):
    _without_library(monkeypatch, tmp_path)
    monkeypatch.setenv("DFQ_BACKEND", backend)
    with pytest.raises(
        RuntimeError, match=f"DFQ_BACKEND={backend} has no 'fake_quantize' .*nstall"
    ):
        fake_quantize(torch.ones(3), *ARGS)


def test_forced_reference(monkeypatch):
    monkeypatch.setenv("DFQ_BACKEND", "reference")
    assert _backend.implementation("fake_quantize", "cpu") is fake_quantize_reference


def test_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("DFQ_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast' is no backend; choose one of compiled, triton"):
        fake_quantize(torch.ones(3), *ARGS)


def _interrupted():
    with _backend.use("reference"):
        assert _backend.implementation("fake_quantize", "cpu") is fake_quantize_reference
        raise KeyError


def test_use_is_undone():
    before = _backend.implementation("fake_quantize", "cpu")
    with pytest.raises(KeyError):
        _interrupted()
    assert _backend.implementation("fake_quantize", "cpu") == before


def _forget_triton_kernels():
    names = [name for name in sys.modules if name.startswith("dfq_kernels._triton")]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def triton_kernels(monkeypatch, tmp_path):
    """Instead of dfq_kernels._triton a package with one op, on a machine that has triton."""
    package = tmp_path / "_triton"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "fake_quantize.py").write_text("def fake_quantize_backward(): return 'triton'\n")
    real = _forget_triton_kernels()
    monkeypatch.setattr(dfq_kernels, "__path__", [str(tmp_path), *dfq_kernels.__path__])
    monkeypatch.setattr(dfq_kernels, "_triton", None, raising=False)
    exists = _backend._exists
    monkeypatch.setattr(_backend, "_exists", lambda name: name == "triton" or exists(name))
    yield package
    _forget_triton_kernels()
    sys.modules.update(real)


def test_cuda_prefers_triton_while_compiled_is_unproven(triton_kernels, monkeypatch):
    assert _backend.implementation("fake_quantize_backward", "cuda")() == "triton"
    assert _backend.implementation("fake_quantize", "cuda") is fake_quantize_reference


def test_cuda_prefers_compiled_once_proven(triton_kernels, monkeypatch):
    monkeypatch.setattr(_backend, "PROVEN_ON_CUDA", frozenset({"fake_quantize_backward"}))
    assert _backend._order("fake_quantize_backward", "cuda")[0] == "compiled"
    assert _backend._order("fake_quantize", "cuda")[0] == "triton"


def test_an_op_with_no_cuda_kernel_is_absent(monkeypatch):
    """_C_cpu.so defines the ops for every device; _C_cuda.so need not have all of them."""
    if not _backend._load_library("cpu"):
        pytest.skip("the compiled kernels are not in this install")
    monkeypatch.setattr(_backend, "_load_library", lambda device: True)
    assert _backend.variant("quantize", "compiled", "cpu") is not None
    assert _backend.variant("quantize", "compiled", "cuda") is None


def test_cuda_needs_the_library_that_defines_the_ops(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        _backend, "_library_path", lambda device: tmp_path / _backend.LIBRARIES[device]
    )
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
    assert _backend.variant("fake_quantize", "compiled", "cuda") is None
    assert "dfq_kernels/_C_cpu.so is not there" in _backend._why_not("compiled", "cuda")


def test_broken_triton_kernels_raise(triton_kernels):
    (triton_kernels / "fake_quantize.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _backend.implementation("fake_quantize", "cuda")


def test_report_says_why_not(monkeypatch, tmp_path):
    _without_library(monkeypatch, tmp_path)
    report = {(status.backend, status.device): status for status in _backend.report()}
    assert set(report) == {(b, d) for d, order in _backend.ORDER.items() for b in order}
    assert report["reference", "cpu"].available
    compiled = report["compiled", "cpu"]
    assert not compiled.available
    assert "python -m dfq_kernels.build" in compiled.reason
    assert all(status.available == (status.reason == "") for status in report.values())
    if not torch.cuda.is_available():
        assert report["triton", "cuda"].reason == "torch finds no CUDA device."
