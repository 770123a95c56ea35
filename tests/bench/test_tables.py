"""Records to tables: exact."""

import json

import pytest

from bench import report, tables

MACHINE = {
    "commit": "abc1234",
    "dirty": False,
    "date": "2026-01-02",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "processor": "A CPU",
    "cores": 4,
    "isa": "AVX512",
    "gpu": None,
    "load": 0.5,
    "tiny": False,
}
README = """# A
<!-- bench:cpu -->
old
<!-- /bench:cpu -->
between
<!-- bench:h200 -->
<!-- /bench:h200 -->
end
"""


def _record(**changes):
    fields = {
        "kind": "bench",
        "op": "double",
        "ops": ["double"],
        "case": "forward",
        "size": "8 fp32",
        "backend": "compiled",
        "device": "cpu",
        "us": 2.0,
        "us_p20": 1.5,
        "us_p80": 4.25,
        "ns_per_element": 0.1708,
        "gb_per_s": 3655.2,
        "of_copy_bandwidth": None,
        "of_copy_aim": None,
        "baseline": None,
        "ratio": None,
        "aim": None,
    }
    return {**fields, **MACHINE, **changes}


CPU = [
    _record(baseline="ATen learnable", ratio=38.34, aim=15),
    _record(baseline="eager composite", ratio=123.4),
    _record(baseline="clone", ratio=0.987),
    _record(baseline="ours in fp32", ratio=1.0),
    _record(case="backward", ns_per_element=930.4),
]
CPU_TABLE = """
| op | case | input | ns / element | ATen | eager composite | torch.compile | other |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
| `double` | forward | 8 fp32 | 0.17 | 38.3x (learnable) | 123x |  | 0.99x clone, 1x ours in fp32 |
| `double` | backward | 8 fp32 | 930 |  |  |  |  |

A CPU (AVX512), one thread unless said; torch 2.13.0; commit abc1234; 2026-01-02.

"""
ON_GPU = {"device": "cuda", "gpu": "A GPU", "of_copy_bandwidth": 0.853, "of_copy_aim": 0.85}
GPU = [
    _record(**ON_GPU, baseline="torch.compile", ratio=1.05, aim=1.1),
    _record(**ON_GPU, backend="triton", us=1.0, baseline="torch.compile", ratio=2.1, aim=1.1),
    _record(**ON_GPU, op="halve", ops=["halve"], baseline="ATen", ratio=1.5, aim=2),
    _record(
        **{**ON_GPU, "of_copy_bandwidth": 0.4}, op="halve", ops=["halve"], backend="triton", us=3.0
    ),
]
GPU_TABLE = """
| op | case | input | backend | µs (p20-p80) | GB/s | of copy | ATen | eager composite | \
torch.compile | other |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| `double` | forward | 8 fp32 | triton | 1 (1.5-4.25) | 3655 | 85% |  |  | 2.1x |  |
| `halve` | forward | 8 fp32 | compiled | 2 (1.5-4.25) | 3655 | 85% | 1.5x |  |  |  |

A GPU; torch 2.13.0; triton 3.9.0; commit abc1234; 2026-01-02.

"""


@pytest.fixture
def files(tmp_path):
    """A README, and a function that puts records into a folder of results."""
    readme = tmp_path / "README.md"
    readme.write_text(README)

    def put(folder, records):
        path = tmp_path / "results" / folder / "double.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in records))

    flags = ["--readme", str(readme), "--results", str(tmp_path / "results")]
    return readme, put, lambda *more: report.main([*flags, *more])


def test_fills_the_readme(files):
    readme, put, run = files
    put("cpu", CPU)
    put("h200", [{"kind": "roof"}, *GPU])
    assert run() == 0
    head, middle, tail = "# A\n<!-- bench:cpu -->\n", "<!-- /bench:cpu -->\nbetween\n", "end\n"
    expected = f"{head}{CPU_TABLE}{middle}<!-- bench:h200 -->\n{GPU_TABLE}<!-- /bench:h200 -->\n"
    assert readme.read_text() == expected + tail
    assert run("--check") == 0


def test_says_that_nothing_was_measured(files):
    readme, _, run = files
    assert run() == 0
    assert readme.read_text().count("\nNot measured yet.\n<!-- /bench:") == 2


def test_check_changes_nothing(files, capsys):
    readme, put, run = files
    put("cpu", CPU)
    assert run("--check") == 1
    assert readme.read_text() == README
    assert "is out of date; run python -m bench.report" in capsys.readouterr().err


def test_refuses_what_tiny_shapes_gave(files, capsys):
    readme, put, run = files
    put("cpu", [_record(tiny=True)])
    assert run() == 1
    assert "tiny shapes" in capsys.readouterr().err
    assert readme.read_text() == README


def test_results_without_a_place_are_an_error(files, capsys):
    _, put, run = files
    put("b200", CPU)
    assert run() == 1
    assert "add the lines <!-- bench:b200 -->" in capsys.readouterr().err


def test_circumstances_tell_changes_and_load():
    (line,) = tables.circumstances([_record(dirty=True, load=3.1)])
    assert "commit abc1234 with changes; 2026-01-02; taken while the machine did other" in line
    assert line.endswith("(load 3.1).")
    assert len(tables.circumstances([*CPU, _record(commit="def")])) == 2


def test_winners():
    both = [{"op": "both", "ops": ["double", "halve"]}]
    alone = [{"op": "alone", "ops": ["alone"]}]
    times = [("a", "compiled", 1.0), ("a", "triton", 2.0), ("b", "compiled", 3.0)]
    times += [("b", "triton", 1.5), ("c", "compiled", 1.0), ("c", "triton", 8.0)]
    records = [_record(case=case, backend=backend, us=us) for case, backend, us in times]
    records += [_record(**fields) for fields in both + alone]
    assert tables.winners(tables.measured(records)) == [
        "double: compiled, 2.00 times as fast as triton (3 cases, 0.5-8)",
        "alone: compiled, the only backend that ran",
    ]
    swapped = {"compiled": "triton", "triton": "compiled"}
    records = [_record(case=c, backend=swapped[b], us=us) for c, b, us in times]
    assert tables.winners(tables.measured(records)) == [
        "double: triton, 2.00 times as fast as compiled (3 cases, 0.5-8)"
    ]


def test_missed_aims_are_those_of_the_faster_backend():
    assert tables.missed(tables.measured(GPU), GPU) == [
        "halve, forward, 8 fp32, compiled: 1.5x ATen, aim 2"
    ]
    slow = [_record(**{**ON_GPU, "of_copy_bandwidth": 0.8})]
    assert tables.missed(tables.measured(slow), slow) == [
        "double, forward, 8 fp32, compiled: 80% of the copy bandwidth, aim 85%"
    ]
