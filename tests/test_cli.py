"""The command line: flags, exit codes, one sentence for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dfq
from dfq.cli import flags, main
from dfq.methods import METHODS
from tests.tiny import FLAGS, MODEL, network, save_images
from tests.tiny_method import TINY, TinyConfig


@pytest.fixture(autouse=True)
def _tiny_method(monkeypatch):
    monkeypatch.setitem(METHODS, "tiny", TINY)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(network().state_dict(), path)
    return path


def _quantize(*words, method="tiny"):
    return main(["quantize", MODEL, *FLAGS, "--method", method, *map(str, words)])


def _sentence(capsys):
    """What is on stderr, which must be one sentence and no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert text.startswith("dfq: ")
    assert text.count("\n") == 1
    return text


def test_a_run_prints_float_nearest_and_student(tmp_path, capsys, weights):
    images = save_images(tmp_path / "e.npz")
    out = tmp_path / "run"
    assert _quantize("--weights", weights, "--bits", "w3a3", "--eval", images, "--out", out) == 0
    printed = capsys.readouterr()
    results = json.loads((out / "result.json").read_text())
    for name in ("float", "nearest", "student"):
        assert f"{results[f'{name}_top1']:.1f}" in printed.out
    assert str(out) in printed.out.replace("\n", "")
    assert "fit 12/12" in printed.err
    assert results["model"] == MODEL
    assert results["weights"] == str(weights)


def test_the_command_of_the_readme_parses():
    words = (
        "cifar:resnet20 --weights resnet20-12fca82f.th --shape 3,32,32 --classes 10 "
        "--mean .485,.456,.406 --std .229,.224,.225 --bits w4a4 --method dmkd "
        "--eval cifar10_test1000.npz --out DIR --effort quick --edge-bits 8 --seed 3 --device cpu"
    )
    parsed, config = flags.parse_quantize(words.split())
    assert flags.data_spec(parsed) == dfq.DataSpec(
        (3, 32, 32), 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    assert (parsed.model, parsed.bits, parsed.method) == ("cifar:resnet20", "w4a4", "dmkd")
    assert (parsed.edge_bits, parsed.seed, parsed.out) == (8, 3, Path("DIR"))
    assert config == METHODS["dmkd"].efforts["quick"]


@pytest.mark.parametrize("words", [["--effort", "quick"], ["--effort=quick"]])
def test_effort_chooses_the_numbers_and_flags_change_them(words):
    base = [MODEL, *FLAGS, "--method", "tiny", *words]
    assert flags.parse_quantize(base)[1] == TinyConfig(steps=3)
    changed = flags.parse_quantize([*base, "--lr", "0.5", "--widths", "4,2", "--explode"])[1]
    assert changed == TinyConfig(steps=3, lr=0.5, widths=(4, 2), explode=True)


@pytest.mark.parametrize("method", ["dmkd", "gdfq", "recipe"])
def test_every_field_of_a_methods_config_is_a_flag(method, capsys):
    assert main(["quantize", "--method", method, "--help"]) == 0
    text = capsys.readouterr().out
    config = METHODS[method].efforts["default"]
    for field in config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text


def test_flags_of_nested_configs_carry_their_name():
    words = [MODEL, *FLAGS, "--latents.batch-size", "7", "--student.lr", "0.25"]
    config = flags.parse_quantize(words)[1]
    assert config.latents.batch_size == 7
    assert config.student.lr == 0.25


def test_evaluate_measures_a_run_and_its_float_model(tmp_path, capsys):
    images = save_images(tmp_path / "e.npz")
    out = tmp_path / "run"
    assert _quantize("--eval", images, "--out", out) == 0
    results = json.loads((out / "result.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(out), "--eval", str(images)]) == 0
    assert f"top-1 {results['student_top1']:.2f} % on 40 images" in capsys.readouterr().out
    assert main(["evaluate", MODEL, *FLAGS, "--eval", str(images)]) == 0
    assert f"top-1 {results['float_top1']:.2f} % on 40 images" in capsys.readouterr().out


def test_synthesize_makes_images_that_quantize_learns_from(tmp_path, capsys, weights):
    made, out = tmp_path / "i.npz", tmp_path / "run"
    words = ["--teachers", f"{MODEL}={weights}@.4/.3", MODEL, "--images", "9", "--out", str(made)]
    words += ["--inversion.batch-size", "8", "--inversion.steps", "2", "--inversion.shift", "1"]
    assert main(["synthesize", MODEL, *FLAGS, *words]) == 0
    assert f"Wrote 9 images by lis to {made}." in capsys.readouterr().out
    learning = ["--schedule.steps-per-batch", "2", "--schedule.shift", "1", "--effort", "quick"]
    words = ["--images", made, "--out", out, *learning]
    assert _quantize(*words, method="gdfq") == 0
    results = json.loads((out / "result.json").read_text())
    assert results["images_file"] == str(made)
    with np.load(made) as first, np.load(out / "images.npz") as second:
        np.testing.assert_array_equal(first["images"], second["images"][:9])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--teachers", "cifar:resnet32"], "to a teacher cifar:resnet32=FILE"),
        (["--teachers", f"{MODEL}=none.pt"], "there is no weight file none.pt"),
        (["--teachers", f"{MODEL}@x/1"], "defines no function network@x/1"),
        (["--courses", "2"], "courses of 2 teachers do not hold 1"),
        (["--images", "none.npz"], "there is no image file none.npz"),
        (["--method", "gdfq", "--teachers", MODEL], "gdfq makes its images from one model"),
    ],
)
def test_wrong_teachers_and_images_are_one_sentence_and_exit_2(tmp_path, capsys, words, sentence):
    method = words[1] if words[0] == "--method" else "lis"
    assert _quantize(*words, "--out", tmp_path / "run", method=method) == 2
    assert sentence in _sentence(capsys)
    assert not (tmp_path / "run" / "result.json").exists()


def _broken_weights(path, kind):
    state = network().state_dict()
    if kind == "nan":
        state["0.weight"] = state["0.weight"] * float("nan")
    elif kind == "keys":
        state["9.weight"] = state.pop("8.weight")
    if kind == "corrupt":
        path.write_bytes(b"these are no weights")
    elif kind != "missing":
        torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no weight file"),
        ("corrupt", "corrupt"),
        ("keys", "1 key missing (8.weight) and 1 key unexpected (9.weight)"),
        ("nan", "0.weight contains NaN"),
    ],
)
def test_wrong_weights_are_one_sentence_and_exit_2(tmp_path, capsys, kind, words):
    path = _broken_weights(tmp_path / "weights.pt", kind)
    assert _quantize("--weights", path, "--out", tmp_path / "run") == 2
    assert words in _sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((40, 9, 9, 1), np.uint8)}, "[40, 9, 9, 1]"),
        ({"y": np.arange(40)}, "from 0 to 39"),
    ],
)
def test_a_wrong_evaluation_file_is_one_sentence_and_exit_2(tmp_path, capsys, changes, words):
    path = save_images(tmp_path / "e.npz", **changes)
    assert _quantize("--eval", path, "--out", tmp_path / "run") == 2
    assert words in _sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--bits", "w44"], "'w44'"),
        (["--shape", "3,8,8", "--mean=", "--std="], "does not take images of shape 3,8,8"),
        (["--shape", "3,8,8"], "mean has 1 values but shape has 3 channels"),
        (["--shape", "8,8"], "channels,height,width"),
        (["--shape", "a,b,c"], "'a,b,c'"),
        (["--classes", "9"], "4 outputs but classes is 9"),
        (["--classes", "1"], "classes must be at least 2"),
        (["--mean", "x"], "numbers separated by commas"),
        (["--std", "0"], "std must be positive"),
        (["--effort", "heroic"], "no effort 'heroic'"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--edge-bits", "1"], "edge_bits"),
        (["--seed", "-1"], "seed"),
        (["--mean", "nan"], "mean must be finite"),
        (["--std", "nan"], "std must be positive"),
        (["--steps", "0"], "steps must be positive, got 0"),
    ],
)
def test_wrong_flags_are_one_sentence_and_exit_2(tmp_path, capsys, words, sentence):
    assert _quantize(*words, "--out", tmp_path / "run") == 2
    assert sentence in _sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_a_rate_below_zero_is_refused_before_images_are_made(tmp_path, capsys):
    run = tmp_path / "run"
    assert _quantize("--student.lr", "-1", "--out", run, method="recipe") == 2
    assert "dfq: student.lr must be at least 0, got -1.0." in _sentence(capsys)
    assert not run.exists()


def test_a_model_without_batch_norm_is_one_sentence_and_exit_2(tmp_path, capsys):
    model = MODEL.replace(":network", ":without_batch_norm")
    words = ["quantize", model, *FLAGS, "--method", "tiny", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "no BatchNorm" in _sentence(capsys)
    assert not (tmp_path / "run").exists()


def test_unknown_words_exit_2(tmp_path, capsys):
    assert main(["quantise"]) == 2
    assert "choose from quantize" in _sentence(capsys)
    assert _quantize(method="magic") == 2
    assert "no method 'magic'" in _sentence(capsys)
    assert _quantize("--stepz", "3") == 2
    assert "--steps" in capsys.readouterr().err  # tyro says what was meant


def test_evaluate_of_nothing_is_one_sentence_and_exit_2(tmp_path, capsys):
    images = save_images(tmp_path / "e.npz")
    assert main(["evaluate", str(tmp_path), "--eval", str(images)]) == 2
    assert "no finished run" in _sentence(capsys)
    assert main(["evaluate", MODEL, "--eval", str(images)]) == 2
    assert "--shape and --classes" in _sentence(capsys)
    assert main(["evaluate", MODEL, *FLAGS, "--eval", str(tmp_path / "none.npz")]) == 2
    assert "no evaluation file" in _sentence(capsys)


def test_a_run_that_diverges_exits_1(tmp_path, capsys):
    assert _quantize("--explode", "--out", tmp_path) == 1
    assert "loss became nan at step 10" in _sentence(capsys)
    assert not (tmp_path / "result.json").exists()


def test_an_interrupt_is_one_line_and_exit_130(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "tiny", TINY._replace(run=interrupted))
    assert _quantize() == 130
    assert _sentence(capsys) == "dfq: interrupted.\n"


def test_a_warning_is_one_line_on_stderr(monkeypatch, capsys):
    def collapsing(teacher, student, data, config, *, rng, report):
        report("fit", 10, 10, weight_entropy=0.01)
        return TINY.run(teacher, student, data, config, rng=rng, report=report)

    monkeypatch.setitem(METHODS, "tiny", TINY._replace(run=collapsing))
    assert _quantize() == 0
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "collapse" in line]
    assert line.startswith("warning: the teacher weights collapse")


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_allocation():
    """The second time round, 64 MiB come without page faults."""
    code = """
import ctypes, resource, sys
from dfq.cli.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(2**26))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, how], capture_output=True, check=True
            ).stdout
        )
        for how in ("keep", "default")
    )
    assert kept < given_back / 10
