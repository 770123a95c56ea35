"""The table of accuracies, and the runner that fills its record."""

import json

import pytest

from bench import bench_methods, method_tables
from tests.tiny import FLAGS, MODEL, save_images

RUN = {
    "kind": "method",
    "model": "cifar:resnet20",
    "method": "recipe",
    "bits": "w4a4",
    "protocol": "gdfq",
    "edge_bits": None,
    "effort": "default",
    "seed": 0,
    "float_top1": 91.5,
    "nearest_top1": 88.0,
    "student_top1": 91.0,
    "packed_top1": 91.1,
    "cpu_seconds": 90.0,
    "peak_mb": 2048,
}


def _rows(*changes):
    table = method_tables.accuracy_table([RUN | change for change in changes])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_seeds_share_a_row_with_mean_and_standard_deviation():
    head, _, row = _rows({}, {"seed": 1, "student_top1": 90.0, "cpu_seconds": 150.0})
    cells = dict(zip(head, row, strict=True))
    assert cells["drop"] == "1.0 ± 0.7"  # of 0.5 and 1.5
    assert (cells["seeds"], cells["CPU min"], cells["GB"]) == ("2", "2.0", "2.0")
    assert cells["published drops"] == "3.8 GDFQ, 2.4 IntraQ, 1.5 HAST, 1.1 SynQ"


def test_rows_go_from_many_bits_to_few_and_from_small_drops_to_large():
    changes = [
        {"bits": "w3a3", "method": "gdfq"},
        {"method": "noise", "student_top1": 80.0},
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
    assert capsys.readouterr().out.count("squant") == 2


def test_noise_is_the_recipe_on_gaussian_images(words):
    words[words.index("squant")], words[words.index("w4a4")] = "noise", "w8a8"
    assert bench_methods.main([*words, "--seeds", "0"]) == 0
    with open(words[words.index("--record") + 1]) as file:
        line = json.loads(file.read())
    assert (line["method"], line["images"]) == ("noise", bench_methods.NOISE_IMAGES)
    assert "latents" in line["config"]


def test_a_run_that_fails_is_told_of_and_not_recorded(words, capsys, tmp_path):
    words[words.index("squant")] = "nonsense"
    assert bench_methods.main([*words, "--seeds", "0"]) == 1
    assert "there is no method 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "record.jsonl").exists()
