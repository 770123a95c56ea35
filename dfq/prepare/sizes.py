"""Channels sized so that all layers together suffer least from rounding.

All channels of a tensor share one grid, so small ones get few of its steps: one layer of FastestDet
takes in the outputs of three stages, and half of its channels deviate by 2 steps of 8 bits or less.
What a channel is made larger the weights that take it in are made smaller, and a row of weights
shares a grid too. Where one layer alone takes a channel in, its size can be chosen for that layer
(as in SmoothQuant, arXiv:2211.10438). Ours: where several do, in several tensors, one descent
chooses all sizes of a network by the noise that is predicted of all its layers.

It serves many bits: ``dfq.methods.recipe`` tells what it brings there. Sizes that suit what images
show exactly leave channels short that other images reach further in. FastestDet at W8A8, not
trained, its weights rounded by ``dfq.prepare.gptq``, lies 0.088 from its teacher on images inverted
from MobileNetV1, 0.148 on painted ones and 0.110 on clouds of 1/f noise (with the largest channels
shrunk alone 0.120, 0.149, 0.100); with half of the images shown with 1.5 times their contrast too
0.085, 0.108 and 0.128; and with ``FAR`` deviations of a BatchNorm kept in reach 0.087, 0.111 and
0.079. With four bits it brings nothing: MobileNetV1 at W4A4 behind the recipe's ``quick`` effort
diverges on crops and blends, painted images, a detector's, dead leaves and clouds by 0.35, 0.64,
0.57, 0.35 and 1.29, and without it by 0.34, 0.59, 0.62, 0.32 and 0.87.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfq.descent import anneal, descend
from dfq.hooks import removing
from dfq.prepare.channels import FIXED, Channels, Reader, find_channels
from dfq.prepare.equalize import FAR
from dfq.prepare.frozen import evaluating
from dfq.prepare.pairs import SMALLEST, some
from dfq.prepare.sensitivity import quantizing_only
from dfq.types import QuantSpec

STEPS, RATE = 300, 0.03  # of Adam, on logarithms of sizes


def size_channels(student: nn.Module, images: Tensor) -> int:
    """Size channels of a prepared ``student``, in place; return how many sizes were free.

    Every channel that ``find_channels`` leaves free is divided by its size s, and all weights that
    take it in are multiplied by it. Sizes are those with the least noise, summed over layers, of
    each the mean over its outputs o, ::

        (step^2 * sum_c s_c^2 * |w_oc|^2 + step_o^2 * K * sum_c E[x_c^2] / s_c^2) / (12 * var y_o)

    the variance that rounding leaves in an output, in units of its own: ``step`` is that of the
    grid that holds all ``x_c / s_c``, ``step_o`` that of the row of weights ``w_oc s_c``, K the
    kernel's positions. A channel is taken to reach ``FAR`` deviations above the mean of its
    BatchNorm, and one deviation at least, even if the images do not show it. The network computes
    what it did; call this before ``calibrate``.

    Args:
        student: from ``prepare``.
        images: [N, C, H, W], of which some are shown, spread over all of them.
    """
    shown = some(images).to(next(student.parameters()))
    channels = find_channels(student, shown[:2])
    if not channels.readers:
        return 0
    noises = _noises(student, channels, shown)
    logs = torch.zeros(channels.total, device=shown.device, requires_grad=True)
    optimizer = torch.optim.Adam([logs], RATE)
    for step in range(STEPS):
        anneal(optimizer, step / STEPS)
        descend(torch.stack([noise(logs) for noise in noises]).sum(), optimizer)
    sizes = logs.detach().exp()
    if not sizes.isfinite().all():
        return 0
    channels.scale(sizes)
    return channels.total - 1


class Noise:
    """What rounding leaves in the outputs of a layer, by the sizes of its inputs.

    Args:
        reader: the layer and the names of its inputs.
        low: [C], the least value of each input, at most 0.
        high: [C], the largest, at least 0.
        power: [C], the mean square.
        spread: [outputs], the variance of each.
    """

    def __init__(
        self, reader: Reader, low: Tensor, high: Tensor, power: Tensor, spread: Tensor
    ) -> None:
        layer, self.spec, names = reader
        groups = getattr(layer, "groups", 1)
        weight = layer.weight.detach().float()[..., None].flatten(2)  # [outputs, I, K]
        heard = spread > SMALLEST**2 * spread.max()  # what does not change tells nothing behind it
        per_output = (1 / spread).where(heard, 0.0)[:, None] / (12 * len(weight))
        self.names = names.to(weight.device).reshape(groups, -1)  # [G, I]
        self.low, self.high, self.power = (v.reshape(groups, -1) for v in (low, high, power))
        gain = weight.square().sum(2) * per_output
        self.gain = gain.reshape(groups, -1, gain.shape[1]).sum(1)  # [G, I]
        self.largest = weight.abs().amax(2).reshape(groups, -1, gain.shape[1])  # [G, O, I]
        self.taps = (per_output * weight.shape[2]).reshape(groups, -1)  # [G, O]
        self.quant_max = layer.weight_quantizer.spec.quant_max

    def __call__(self, logs: Tensor) -> Tensor:
        """Logarithms of sizes by name -> the mean over outputs; []."""
        sizes = logs[self.names].where(self.names != FIXED, 0.0).exp()
        rows = (self.largest * sizes[:, None]).amax(2) / self.quant_max
        of_weights = rows.square() * self.taps * (self.power / sizes.square()).sum(1, keepdim=True)
        if self.spec is None:
            return of_weights.sum()
        step = _step((self.low / sizes).amin(), (self.high / sizes).amax(), self.spec)
        return step**2 * (self.gain * sizes.square()).sum() + of_weights.sum()


def _step(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Of the grid that holds all that it can from ``low``, at most 0, to ``high``."""
    if spec.symmetric:  # the larger side counts twice, or values below zero are zero
        high = torch.maximum(high, -low) if spec.signed else high
        low = -high if spec.signed else torch.zeros_like(low)
    return (high - low) / (spec.quant_max - spec.quant_min)


@torch.no_grad()
def _noises(student: nn.Module, channels: Channels, images: Tensor) -> list[Noise]:
    """Of each reader, by what it sees when ``student`` runs on ``images`` in float."""
    reach = images.new_zeros(channels.total, dtype=torch.float32)
    for norm, names in channels.norms:
        spread = norm.weight.float().abs()
        far = torch.maximum(norm.bias.float() + FAR * spread, spread)
        reach.scatter_reduce_(0, names.to(reach.device), far, "amax")
    reach[FIXED] = 0
    seen: dict[nn.Module, tuple[Tensor, ...]] = {}

    def look(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows, answers = (x.float().transpose(0, 1).flatten(1) for x in (args[0], output))
        low, high = rows.aminmax(dim=1)
        power, spread = rows.square().mean(1), answers.var(1, correction=0)
        seen[layer] = low.clamp(max=0), high.clamp(min=0), power, spread

    hooks = removing(reader.layer.register_forward_hook(look) for reader in channels.readers)
    with hooks, evaluating(student), quantizing_only(student, None):
        student(images)
    noises = []
    for reader in channels.readers:
        low, high, power, spread = seen[reader.layer]
        high = torch.maximum(high, reach[reader.names.to(reach.device)])
        noises.append(Noise(reader, low, high, power, spread))
    return noises
