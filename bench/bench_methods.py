"""``python -m bench.bench_methods MODEL … --eval FILE --record FILE``: accuracies.

Every combination of the given methods, bits, protocols, efforts and seeds, one after the other,
each in a process of its own, each appended to the record as soon as it is known; those that the
record holds already are not run again. What is measured is the student after its last step. The
method ``noise`` is the recipe on Gaussian images: what the learner alone can do. ``dmkd:uniform``
is ``dmkd`` with the changes of that name in ``VARIANTS`` to what the effort says. With ``--images``
every run learns from the same images.

    python -m bench.bench_methods cifar:resnet20 --weights resnet20.th --shape 3,32,32 \\
        --classes 10 --mean .485,.456,.406 --std .229,.224,.225 --eval cifar10.npz \\
        --bits w4a4,w3a3 --methods recipe,genie --seeds 0,1,2 \\
        --record bench/results/methods/resnet20.jsonl

A model that gives maps has no classes. A function ``(model) -> percent`` then says what the float
model, the nearest, the student and the packed one are worth; ``--measure`` is what the record calls
that figure. ``--name`` is what it calls the model, where MODEL holds a path of yours.

    python -m bench.bench_methods models.py:fastestdet --name FastestDet --shape 3,352,352 \\
        --score coco.py:ap50 --measure AP50 --bits w8a8,w4a4 --methods recipe,noise \\
        --record bench/results/methods/fastestdet.jsonl

``python -m bench.report`` makes the tables of README.md from the records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from bench import record
from bench.method_scores import load_score, scores, top1
from bench.method_tables import TOP1
from dfq.cli.memory import keep_freed_memory
from dfq.distill.weighting import UNLEARNED, Objective, WeightInput
from dfq.evaluate import check
from dfq.methods.dmkd import DMKD_BASELINES, DMKDConfig
from dfq.models import load
from dfq.pipeline import Request, Source, execute, suggest_config
from dfq.pipeline.images import write_images
from dfq.pipeline.provenance import file_sha256
from dfq.types import DataSpec, Images, InputError

SETTINGS = ("bits", "protocol", "edge_bits", "effort", "seed")  # of the request
KEYS = ("model", "measure", "method", *SETTINGS, "images_sha256")


def _weighing(config: DMKDConfig) -> dict[str, Any]:
    """Every field but those that stay the effort's: how images are made and learned from."""
    names = [field.name for field in fields(config)]
    decided = ("generator", "student", "schedule", "temperature")
    return {name: getattr(config, name) for name in names if name not in decided}


# method -> name -> what that variant changes in the config of an effort
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dmkd": {
        **{name: {"objective": name} for name in get_args(Objective)},
        **{name: {"weight_input": name} for name in get_args(WeightInput) if name not in UNLEARNED},
        **{name: _weighing(config) for name, config in DMKD_BASELINES.items()},
    }
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing; 1 if a run failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = _flags(words)
    if flags.one:
        print(json.dumps(_one(flags, json.loads(flags.one))))
        return 0
    flags.record.parent.mkdir(parents=True, exist_ok=True)
    known = list(record.read(flags.record.parent)) if flags.record.exists() else []
    done = {tuple(line.get(key) for key in KEYS) for line in known}  # --images came later
    failed = 0
    for case in _cases(flags):
        if tuple(case[key] for key in KEYS) in done:
            continue
        command = [sys.executable, "-m", "bench.bench_methods", *words, "--one", json.dumps(case)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            failed += 1
            print(f"{case}: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        line = json.loads(ended.stdout.splitlines()[-1])
        record.append(flags.record, line | record.circumstances())
        print(_sentence(line), flush=True)
    return 1 if failed else 0


def _flags(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_methods", description=__doc__)
    parser.add_argument("model", help="as dfq quantize takes it")
    parser.add_argument("--name", help="what the record calls the model; default: MODEL")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--shape", type=_numbers(int), required=True)
    parser.add_argument("--classes", type=int, default=0, help="leave it out for maps")
    parser.add_argument("--mean", type=_numbers(float), default=())
    parser.add_argument("--std", type=_numbers(float), default=())
    worth = parser.add_mutually_exclusive_group(required=True)
    worth.add_argument("--eval", type=Path, help="real images, for top-1")
    worth.add_argument("--score", help="file.py:function, (model) -> percent")
    parser.add_argument("--measure", help="what the score is; default: the name of its function")
    methods = "as dfq quantize takes them, noise, or METHOD:VARIANT"
    parser.add_argument("--methods", type=_numbers(str), default=("recipe",), help=methods)
    parser.add_argument("--bits", type=_numbers(str), default=("w4a4",))
    parser.add_argument("--protocols", type=_numbers(str), default=("brecq",))
    parser.add_argument("--efforts", type=_numbers(str), default=("default",))
    parser.add_argument("--edge-bits", type=int)
    parser.add_argument("--seeds", type=_numbers(int), default=(0, 1, 2))
    parser.add_argument("--images", type=Path, help="as dfq quantize takes it; for every run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args(words)
    if flags.eval and flags.measure:
        parser.error("--measure says what a score is; leave it out with --eval.")
    if flags.images and "noise" in flags.methods:
        parser.error("the images of noise are noise; leave out noise or --images.")
    if flags.images and not flags.images.is_file():
        parser.error(f"there is no image file {flags.images}; check --images.")
    return flags


def _numbers(kind: type) -> Any:
    return lambda text: tuple(kind(word) for word in text.split(","))


def _cases(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """In the order of seeds, so that the first rows of a table are there early."""
    lists = (flags.seeds, flags.protocols, flags.efforts, flags.bits, flags.methods)
    digest = file_sha256(flags.images) if flags.images else None
    measure = (flags.measure or flags.score.rpartition(":")[2]) if flags.score else TOP1
    return [
        {
            "model": flags.name or flags.model,
            "measure": measure,
            "method": method,
            "bits": bits,
            "protocol": protocol,
            "edge_bits": flags.edge_bits,
            "effort": effort,
            "seed": seed,
            "images_file": flags.images.name if flags.images else None,
            "images_sha256": digest,
        }
        for seed, protocol, effort, bits, method in itertools.product(*lists)
    ]


def _one(flags: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """One run, in this process."""
    keep_freed_memory()
    data = DataSpec(flags.shape, flags.classes, flags.mean, flags.std)
    if case["method"] != "noise":
        return _measure(flags, case, data, flags.images)
    _, recipe = _method(case, data)
    count = recipe.image_count(data)
    with tempfile.TemporaryDirectory() as folder:
        rng = torch.Generator().manual_seed(case["seed"])
        noise = torch.randn(count, *data.shape, generator=rng)
        path = Path(folder) / "noise.npz"
        write_images(path, Images(noise, torch.zeros(count, dtype=torch.int64)), data)
        return _measure(flags, case, data, path)


def _measure(
    flags: argparse.Namespace, case: dict[str, Any], data: DataSpec, images: Path | None
) -> dict[str, Any]:
    method, config = _method(case, data)
    request = Request(
        **{key: case[key] for key in SETTINGS},
        method=method,
        config=config,
        images=images,
        device="cpu",
        threads=flags.threads,
        source=Source(flags.model, flags.weights),
    )
    score = load_score(flags.score) if flags.score else top1(flags.eval, data)
    eval_images = check(flags.eval, data) if flags.eval else None
    teacher = load(flags.model, data, flags.weights)
    cpu = time.process_time()
    run = execute(teacher, data, request)
    results = run.results
    cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "kind": "method",
        **case,
        **scores(score, run, teacher, data, request),
        "images": results["images"],
        "eval_images": eval_images,
        "seconds": results["seconds"]["prepare"] + results["seconds"]["method"],
        "cpu_seconds": round(cpu, 1),
        "peak_mb": round(peak / 1024),
        "threads": flags.threads,
        "config": results["config"],
    }


def _method(case: dict[str, Any], data: DataSpec) -> tuple[str, Any]:
    """The method that dfq knows, and its config.

    Raises:
        InputError: there is no such method, effort or variant.
    """
    name, _, variant = case["method"].partition(":")
    if name == "noise":
        name = "recipe"
    config = suggest_config(name, case["effort"], maps=not data.classes)
    if not variant:
        return name, config
    known = VARIANTS.get(name, {})
    if variant not in known:
        choices = f"choose from {', '.join(known)}" if known else "it has none"
        raise InputError(f"{name} has no variant {variant!r}; {choices}.")
    return name, replace(config, **known[variant])


def _sentence(line: dict[str, Any]) -> str:
    drop = line["float"] - line["student"]
    return (
        f"{line['method']:16s} {line['bits']} {line['protocol']} {line['effort']} "
        f"seed {line['seed']}: {line['measure']} {line['student']:.1f} "
        f"(packed {line['packed']:.1f}, nearest {line['nearest']:.1f}, float less {drop:.1f}), "
        f"{line['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
