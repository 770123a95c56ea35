"""What each teacher's weight does to a held-out batch: the bilevel objective of ``weighting.py``.

Nothing of this is known to be DMKD's; it is the virtual step of MAML (arXiv:1703.03400) and of
learned weights of samples (arXiv:1803.09050, arXiv:1902.07379), with teachers for samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from dfq.distill.losses import kd_divergence


def teacher_effects(
    student: nn.Module,
    optimizer: Optimizer,
    divergence: Tensor,
    weights: Tensor,
    images: Tensor,
    wanted: Tensor,
    temperature: float,
) -> Tensor:
    """Derivative of the held-out divergence by each teacher's mean weight; [teachers].

    With ``g_k`` the gradient of ``mean_i D_ik``, ``a_k = mean_i a_ik`` and ``lr`` the rates of
    ``optimizer``, the student takes the virtual step ``theta' = theta - lr * sum_k a_k g_k`` of
    plain gradient descent. ``v`` is the gradient at ``theta'`` of the mean ``kd_divergence`` of
    the held-out batch, and the result is ``-lr * <v, g_k>``: below zero where more of teacher k
    would have helped.

    That is exact where all images share their weights. Where they do not, ``mean_i a_ik D_ik`` is
    replaced by ``a_k mean_i D_ik``, so that all images pull their weights the same way: a pull for
    each would take a backward pass an image, or a second derivative, which fake-quantized layers
    lack.

    Args:
        student: left as it is.
        optimizer: holds every parameter of ``student``.
        divergence: ``D``, [B, teachers], a function of these parameters; its graph is kept.
        weights: ``a``, [B, teachers]; no gradient flows to them.
        images: the held-out batch, [N, C, H, W].
        wanted: the logits it should give, [N, classes].
        temperature: of the held-out divergence.
    """
    names, parameters = zip(*student.named_parameters(), strict=True)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_teacher = [_gradient(mean, parameters) for mean in divergence.mean(0)]
    shares = weights.detach().mean(0)
    moved = []
    for parameter, *gradients in zip(parameters, *by_teacher, strict=True):
        step = torch.tensordot(shares, torch.stack(gradients), 1)
        moved.append((parameter.detach() - rates[id(parameter)] * step).requires_grad_())
    logits = functional_call(student, dict(zip(names, moved, strict=True)), (images,))
    held_out = _gradient(kd_divergence(logits, wanted, temperature).mean(), moved)
    steps = [rates[id(p)] * v for p, v in zip(parameters, held_out, strict=True)]
    return torch.stack([-_dot(steps, gradients) for gradients in by_teacher])


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
