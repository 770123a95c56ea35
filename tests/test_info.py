"""``dfq``, ``dfq --help`` and ``dfq info``: with everything installed, and with nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfq
import dfq_kernels
from dfq.cli import main, parity
from dfq_kernels import _backend

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_every_command(words, capsys):
    assert main(words) == 0
    printed = capsys.readouterr().out
    for command in ("quantize", "evaluate", "demo", "info"):
        assert f"\n  {command} " in printed


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dfq {dfq.__version__}\n"


def test_info_names_every_kernel_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in printed
    for backend in ("compiled", "reference", "triton"):
        assert backend in printed


def test_info_check_compares_every_backend_with_the_reference(capsys):
    code = main(["info", "--check"])
    checked = capsys.readouterr().out.partition("Check\n")[2]
    assert code == 0
    available = {s.backend for s in _backend.report() if s.available} - {"reference"}
    assert all(f"{name:11}fake_quantize: agrees" in checked for name in available)
    assert available or "nothing but the reference" in checked


def test_info_check_exits_1_where_a_backend_differs(monkeypatch, capsys):
    def off_by_a_hair(x, *args, **options):
        y = dfq_kernels.fake_quantize(x, *args, **options)
        return y if _backend._forced == "reference" else torch.nextafter(y, y + 1)

    def reference(op, backend, device):
        return original(op, "reference", device)

    original, status = _backend.variant, _backend.Status("compiled", "cpu", True, "")
    monkeypatch.setattr(_backend, "report", lambda: [status])
    monkeypatch.setattr(_backend, "variant", reference)
    monkeypatch.setattr(parity, "fake_quantize", off_by_a_hair)
    monkeypatch.setattr(parity, "DTYPES", (torch.float32,))
    assert main(["info", "--check"]) == 1
    assert (
        "fake_quantize: differs from the reference in y of torch.float32" in capsys.readouterr().out
    )


def _without(packages, code):
    """Run ``code`` in a process in which ``packages`` cannot be imported."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in packages)
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {block}\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_info_works_with_the_standard_library_alone():
    missing = ["torch", "numpy", "rich", "tyro", "safetensors", "sklearn"]
    done = _without(missing, "from dfq.cli import main; sys.exit(main(['info']))")
    assert (done.returncode, done.stderr) == (0, "")
    for package, remedy in (("torch", "pip install torch"), ("tyro", "pip install tyro")):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  {package} ")]
        assert "missing" in line
        assert remedy in line


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (
            ["torch"],
            "dfq quantize needs torch, which is not installed; run: pip install 'dfq[torch]'",
        ),
        (["tyro", "rich"], "dfq quantize needs rich, tyro, which"),
        (["torch", "tyro"], "pip install 'dfq[cli,torch]'"),
    ],
)
def test_a_command_without_its_packages_says_how_to_get_them(missing, words):
    done = _without(missing, "from dfq.cli import main; sys.exit(main(['quantize', 'm']))")
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
