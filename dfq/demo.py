"""``dfq demo``: the whole way on a network that is trained here, in a minute on two cores."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dfq.methods import METHODS
from dfq.pipeline import quantize
from dfq.report.display import accuracy_table, progress
from dfq.types import DataSpec, Report, silent

DATA = DataSpec(shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.37,))
TRAINING_IMAGES = 1257  # of 1797; the other 540 are held out
EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 64, 0.1  # 99 % on the held-out digits
WIDTHS = (12, 12, 12, 12, 24, 24, 24, 24, 24)  # deep and narrow: no channel to spare at two bits


class DigitNet(nn.Module):
    """Nine 3x3 convolutions with BatchNorm and a linear layer: [B, 1, 8, 8] -> [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *WIDTHS), WIDTHS, strict=False):
            stride = 2 if 1 < inputs < outputs else 1
            layers.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(WIDTHS[-1], DATA.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.linear(self.pool(self.features(x)).flatten(1))


def demo_command(argv: Sequence[str]) -> int:
    """Train, forget, quantize, measure, and say what happened."""
    parser = argparse.ArgumentParser(
        prog="dfq demo",
        description="Train a small CNN on scikit-learn's digits, forget the digits, quantize the "
        "CNN without data and measure it on digits that it never saw.",
    )
    parser.add_argument("--bits", default="w2a2", help="of weights and activations: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice: %(default)s")
    flags = parser.parse_args(argv)
    errors, out = Console(stderr=True), Console()
    with progress(errors) as report:
        results = demo(flags.bits, flags.seed, report)
    out.print(accuracy_table(results))
    out.print(summary(results), highlight=False)
    return 0


def demo(bits: str = "w2a2", seed: int = 0, report: Report = silent) -> Mapping[str, Any]:
    """Train a float model, quantize it without data, and return the results of the run.

    Raises:
        InputError: ``bits`` or ``seed`` is wrong.
    """
    method = METHODS["dmkd"]
    config = method.efforts["quick"]
    # digits fill their 8 pixels: moving them by more than one would cut them off
    schedule = dataclasses.replace(config.schedule, shift=1)
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        held_out = Path(folder) / "held_out.npz"
        model = train(held_out, seed, report)  # the training digits end with this call
        return quantize(
            model,
            DATA,
            bits,
            "dmkd",
            config=dataclasses.replace(config, schedule=schedule),
            seed=seed,
            device="cpu",
            eval_file=held_out,
            report=report,
        ).results


def train(held_out: Path, seed: int = 0, report: Report = silent) -> nn.Module:
    """Train a :class:`DigitNet` on some digits and save the others as an evaluation file."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # [N, 8, 8, 1]
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=rng)
    kept = order[TRAINING_IMAGES:].numpy()
    np.savez(held_out, x=pixels[kept], y=digits.target[kept])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images = (images - DATA.mean[0]) / DATA.std[0]
    labels = torch.from_numpy(digits.target)
    with torch.random.fork_rng(devices=[]):  # layers initialize from the global generator
        torch.manual_seed(seed)
        model = DigitNet()
    chosen = order[:TRAINING_IMAGES]
    _fit(model, images[chosen], labels[chosen], rng, report)
    return model.eval()


def summary(results: Mapping[str, Any]) -> str:
    """What happened, in one sentence."""
    lost = results["float_top1"] - results["nearest_top1"]
    left = results["float_top1"] - results["student_top1"]
    return (
        f"Rounding to {results['bits']} cost {lost:.1f} points; after learning from "
        f"{results['images']} images that the float network dreamed up, and from no real one, "
        f"{max(left, 0.0):.1f} are missing."
    )


def _fit(
    model: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator, report: Report
) -> None:
    """SGD with a one-cycle schedule."""
    batches = len(images) // BATCH_SIZE
    steps = EPOCHS * batches
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(images), generator=rng)
        batch = order[step % batches * BATCH_SIZE :][:BATCH_SIZE]
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report("train", step + 1, steps, loss=loss.detach())


@contextmanager
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share out: two threads take twice as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
