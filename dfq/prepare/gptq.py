"""Weights rounded one after the other, each making up for those before: GPTQ.

To the nearest, the errors of a row of weights add up however their inputs go together. Here the
weights that are not rounded yet move by what takes most of each error out of the row's output
(Frantar et al., ICLR 2023, arXiv:2210.17323), as the second moments of the inputs tell: data-free,
those that synthesized images lead to.

From the paper; its code was not used. The paper's: the order of columns by their power, the damping
and the blocks. Ours: convolutions, of groups too, over the patches that they see. The grid is that
of the student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.hooks import removing
from dfq.prepare.frozen import evaluating
from dfq.prepare.layers import QConv2d, QLinear, quantized_layers
from dfq.prepare.pairs import some
from dfq.prepare.sensitivity import quantizing_only
from dfq.prepare.squant import round_weights

DAMPING = 0.01  # of the mean power of an input, added to that of each; as the paper has it
BLOCK = 128  # columns whose errors reach the others together; as the paper has it
AT_ONCE = 1 << 24  # values of patches in memory


@torch.no_grad()
def compensate_rounding(student: nn.Module, images: Tensor) -> None:
    """Round the weights of every quantized layer by ``compensated_codes``, in place.

    They then lie on their grids, so that their quantizers give exactly them. Activations are not
    rounded meanwhile. A layer that the images do not reach stays as it is.

    Args:
        student: from ``prepare``, with its scales set.
        images: [N, C, H, W], of which some are shown, spread over all of them.

    Raises:
        InputError: if a weight has no scale yet.
    """

    def compensate(layer: QConv2d | QLinear, args: tuple[Tensor]) -> None:
        moments = second_moments(layer, args[0])

        def choose(steps: Tensor, quant_min: int, quant_max: int) -> Tensor:
            rows = steps.reshape(len(moments), -1, moments.shape[1])
            return compensated_codes(rows, moments, quant_min, quant_max).reshape(steps.shape)

        round_weights(layer, choose)

    layers = quantized_layers(student).values()
    hooks = removing(layer.register_forward_pre_hook(compensate) for layer in layers)
    with hooks, evaluating(student), quantizing_only(student, None):
        student(some(images).to(next(student.parameters())))


def compensated_codes(steps: Tensor, moments: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integers near ``steps`` for which the outputs of a layer change little.

    Column by column, the one of most power first: round, and move the columns that are left by what
    least changes ``sum (steps - codes) x`` over the inputs x, in the mean square.

    Args:
        steps: [G, O, K], the weights of G groups' outputs for K inputs each, in steps of the grid.
        moments: [G, K, K], ``E[x x']`` of the inputs.
        quant_min: smallest code.
        quant_max: largest code.

    Returns:
        [G, O, K], float32 holding integers.
    """
    power = moments.diagonal(dim1=1, dim2=2)
    order = power.argsort(dim=1, descending=True, stable=True)
    damping = DAMPING * power.double().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    ordered = moments.double().gather(1, order[:, :, None].expand_as(moments))
    ordered = ordered.gather(2, order[:, None].expand_as(moments))
    ordered.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest = steps.double().gather(2, order[:, None].expand_as(steps))
    codes = torch.empty_like(rest)
    columns = rest.shape[2]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(rest[:, :, start:end])
        for k in range(start, end):
            codes[:, :, k] = rest[:, :, k].round().clamp(quant_min, quant_max)
            error = (rest[:, :, k] - codes[:, :, k]) / upper[:, k, k, None]
            rest[:, :, k:end] -= error[:, :, None] * upper[:, None, k, k:end]
            errors[:, :, k - start] = error
        rest[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes).float()


def second_moments(layer: QConv2d | QLinear, x: Tensor) -> Tensor:
    """``E[x x']`` [groups, K, K] of the K inputs of one output, over all outputs of a group."""
    groups, size = getattr(layer, "groups", 1), layer.weight[0].numel()
    total = x.new_zeros(groups, size, size, dtype=torch.float32)
    count = 0
    each = max(1, AT_ONCE * len(x) // (x.numel() * layer.weight[0, 0].numel()))
    for part in x.float().split(each):
        patches = _patches(layer, part).reshape(len(part), groups, size, -1).transpose(0, 1)
        patches = patches.transpose(1, 2).flatten(2)  # [G, K, places]
        total += patches @ patches.transpose(1, 2)
        count += patches.shape[2]
    return total / count


def _patches(layer: QConv2d | QLinear, x: Tensor) -> Tensor:
    """[B, ...] -> [B, inputs of all groups, places]."""
    if isinstance(layer, QLinear):
        return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
