"""The table of accuracies, and the runner that fills its record."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from bench import bench_methods, method_tables
from dfq.methods import METHODS
from dfq.methods.dmkd import DMKD_BASELINES
from dfq.pipeline import quantize
from dfq.pipeline.images import write_images
from dfq.types import Images, InputError
from tests.tiny import DATA, FLAGS, MODEL, network, save_images

RUN = {
    "kind": "method",
    "model": "cifar:resnet20",
    "measure": "top-1",
    "method": "recipe",
    "bits": "w4a4",
    "protocol": "gdfq",
    "edge_bits": None,
    "effort": "default",
    "seed": 0,
    "float": 91.5,
    "nearest": 88.0,
    "student": 91.0,
    "packed": 91.1,
    "cpu_seconds": 90.0,
    "peak_mb": 2048,
}


def _rows(*changes):
    table = method_tables.accuracy_table([RUN | change for change in changes])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_seeds_share_a_row_with_mean_and_standard_deviation():
    head, _, row = _rows({}, {"seed": 1, "student": 90.0, "cpu_seconds": 150.0})
    cells = dict(zip(head, row, strict=True))
    assert cells["drop"] == "1.0 ± 0.7"  # of 0.5 and 1.5
    assert (cells["seeds"], cells["CPU min"], cells["GB"]) == ("2", "2.0", "2.0")
    assert cells["published drops"] == "3.8 GDFQ, 2.4 IntraQ, 1.5 HAST, 1.1 SynQ"


def test_rows_go_from_many_bits_to_few_and_from_small_drops_to_large():
    changes = [
        {"bits": "w3a3", "method": "gdfq"},
        {"method": "noise", "student": 80.0},
        {"method": "genie"},
        {"bits": "w8a8"},
    ]
    rows = _rows(*changes)[2:]
    assert [(row[2], row[3]) for row in rows] == [
        ("w8a8", "`recipe`"),
        ("w4a4", "`genie`"),
        ("w4a4", "`noise`"),
        ("w3a3", "`gdfq`"),
    ]


def test_protocols_and_edges_are_never_in_one_row():
    rows = _rows({}, {"protocol": "brecq"}, {"protocol": "brecq", "edge_bits": 4})[2:]
    assert [row[1] for row in rows] == ["brecq", "brecq, edges 4 bits", "gdfq"]
    assert rows[0][-1] == ""  # what others report of the other protocol


def test_given_images_are_told_of_and_never_in_one_row_with_others():
    given = {"images_file": "a.npz", "images_sha256": "0"}
    changes = [{}, {"images_file": None, "images_sha256": None}, given, given]
    rows = _rows(*changes, given | {"images_sha256": "1"})[2:]
    assert [(row[4], row[9]) for row in rows] == [
        ("default", "2"),
        ("default, images of a.npz", "2"),
        ("default, images of a.npz", "1"),
    ]


def test_a_score_names_its_measure_and_never_shares_a_row_with_another():
    scored = {"measure": "AP50"}
    rows = _rows({}, scored, scored, {"measure": "AP75"})[2:]
    assert [(row[0], row[9]) for row in rows] == [
        ("cifar:resnet20", "1"),
        ("cifar:resnet20 (AP50)", "2"),
        ("cifar:resnet20 (AP75)", "1"),
    ]
    assert rows[0][-1].startswith("3.8 GDFQ")
    assert rows[1][-1] == ""  # what others report is top-1


def test_circumstances_say_what_was_measured_on():
    machine = {"dirty": False, "processor": "A CPU", "threads": 1, "torch": "2", "commit": "a"}
    machine |= {"date": "2026-01-02", "isa": "AVX2"}
    counted, scored = {"eval_images": 650}, {"eval_images": None, "measure": "AP50"}
    records = [RUN | machine | change for change in (counted, scored, scored)]
    assert method_tables.circumstances(records) == [
        f"{what}, for measuring only; A CPU (AVX2); threads: 1; torch 2; commit a; 2026-01-02."
        for what in ("650 real images", "AP50")
    ]


def test_circumstances_name_every_commit_once():
    machine = {"processor": "A CPU", "isa": "", "threads": 1, "torch": "2", "eval_images": 650}
    commits = [("b", False, "2026-01-03"), ("a", True, "2026-01-02"), ("b", False, "2026-01-04")]
    names = ("commit", "dirty", "date")
    records = [RUN | machine | dict(zip(names, values, strict=True)) for values in commits]
    (line,) = method_tables.circumstances(records)
    assert line.endswith("torch 2; commits b, a with changes; 2026-01-02 to 2026-01-04.")


@pytest.fixture
def words(tmp_path):
    record = tmp_path / "record.jsonl"
    flags = ["--eval", str(save_images(tmp_path / "e.npz")), "--record", str(record)]
    return [MODEL, *FLAGS, *flags, "--methods", "squant", "--bits", "w4a4"]


def test_runs_what_the_record_lacks(words, capsys):
    path = words[words.index("--record") + 1]
    assert bench_methods.main([*words, "--seeds", "0"]) == 0
    assert bench_methods.main([*words, "--seeds", "0,1"]) == 0
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    assert [line["seed"] for line in lines] == [0, 1]
    assert all(line["eval_images"] == 40 and line["peak_mb"] > 0 for line in lines)
    assert all(line["measure"] == "top-1" and line["model"] == MODEL for line in lines)
    file = words[words.index("--eval") + 1]
    wanted = quantize(network(), DATA, "w4a4", "squant", threads=1, eval_file=file).results
    for name in ("float", "nearest", "student", "packed"):
        assert lines[0][name] == wanted[f"{name}_top1"]
    assert capsys.readouterr().out.count("squant") == 2


def test_noise_is_the_recipe_on_gaussian_images(words):
    words[words.index("squant")], words[words.index("w4a4")] = "noise", "w8a8"
    assert bench_methods.main([*words, "--seeds", "0", "--efforts", "quick"]) == 0
    with open(words[words.index("--record") + 1]) as file:
        line = json.loads(file.read())
    assert (line["method"], line["images"]) == ("noise", 512)  # as many as at quick
    assert "latents" in line["config"]


def test_a_run_that_fails_is_told_of_and_not_recorded(words, capsys, tmp_path):
    words[words.index("squant")] = "nonsense"
    assert bench_methods.main([*words, "--seeds", "0"]) == 1
    assert "there is no method 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "record.jsonl").exists()


def _read(words):
    with open(words[words.index("--record") + 1]) as file:
        return [json.loads(line) for line in file]


def _save(path, seed):
    images = torch.randn(24, *DATA.shape, generator=torch.Generator().manual_seed(seed))
    write_images(path, Images(images, torch.zeros(24, dtype=torch.int64)), DATA)
    return path


def test_every_run_learns_from_the_given_images(words, tmp_path):
    first, second = (_save(tmp_path / f"{seed}.npz", seed) for seed in (1, 2))
    words += ["--seeds", "0"]
    for images in (first, first, second):  # the same again is not run again
        assert bench_methods.main([*words, "--images", str(images)]) == 0
    assert bench_methods.main(words) == 0
    lines = _read(words)
    assert [line["images_file"] for line in lines] == ["1.npz", "2.npz", None]
    assert [line["images"] for line in lines] == [24, 24, 256]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    assert [line["images_sha256"] for line in lines] == [*digests, None]


def test_lines_from_before_images_could_be_given_are_known(words):
    flags = bench_methods._flags([*words, "--seeds", "0"])
    (case,) = bench_methods._cases(flags)
    older = {key: value for key, value in case.items() if not key.startswith("images")}
    flags.record.write_text(json.dumps(older) + "\n")
    assert bench_methods.main([*words, "--seeds", "0"]) == 0
    assert _read(words) == [older]


@pytest.mark.parametrize(
    ("method", "file", "message"),
    [("squant", "none.npz", "no image file none.npz"), ("noise", __file__, "noise are noise")],
)
def test_images_that_cannot_be_learned_from_are_refused(words, method, file, message, capsys):
    words[words.index("squant")] = method
    with pytest.raises(SystemExit):
        bench_methods.main([*words, "--images", file])
    assert message in capsys.readouterr().err


def _config(method, effort="quick"):
    return bench_methods._method({"method": method, "effort": effort}, DATA)


@pytest.mark.parametrize("effort", ["quick", "paper"])
@pytest.mark.parametrize("name", DMKD_BASELINES)
def test_a_baseline_differs_from_its_effort_in_the_weighing_alone(name, effort):
    own = METHODS["dmkd"].efforts[effort]
    parts = ("generator", "student", "schedule", "temperature")
    kept = {part: getattr(own, part) for part in parts}
    assert _config(f"dmkd:{name}", effort) == ("dmkd", replace(DMKD_BASELINES[name], **kept))


def test_every_objective_and_weight_input_is_a_variant():
    quick = METHODS["dmkd"].efforts["quick"]
    for name in ("softmax", "uncertainty", "entropy", "adversarial", "meta"):
        assert _config(f"dmkd:{name}")[1] == replace(quick, objective=name)
    for name in ("image", "logits", "bank"):
        assert _config(f"dmkd:{name}")[1] == replace(quick, weight_input=name)
    assert len(bench_methods.VARIANTS["dmkd"]) == 5 + 3 + len(DMKD_BASELINES)


def test_a_variant_runs_under_its_own_name(words, capsys, monkeypatch):
    monkeypatch.setitem(bench_methods.VARIANTS, "squant", {"few": {"images": 7}})
    case = dict.fromkeys(bench_methods.KEYS) | {"method": "squant:few", "bits": "w4a4", "seed": 0}
    case |= {"protocol": "brecq", "effort": "quick"}
    assert bench_methods.main([*words, "--one", json.dumps(case)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["method"], line["images"]) == ("squant:few", 7)
    assert line["config"] == {"images": 7}


@pytest.mark.parametrize(
    ("method", "message"),
    [("dmkd:nonsense", "choose from softmax, "), ("squant:few", "it has none")],
)
def test_an_unknown_variant_is_refused(method, message):
    with pytest.raises(InputError, match=message):
        _config(method)
