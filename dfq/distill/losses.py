"""Distillation losses. Each returns one value a sample, [B]; the method weighs and reduces."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.outputs import are_logits, map_distance


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``; [B, classes] twice -> [B].

    Summed over classes (Hinton et al., arXiv:1503.02531), so its batch mean is what PyTorch calls
    "batchmean". GDFQ's released code divides by the number of classes too.
    """
    log_p = F.log_softmax(student_logits / temperature, dim=1)  # [B, classes]
    log_q = F.log_softmax(teacher_logits / temperature, dim=1)  # [B, classes]
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1) * temperature**2


def output_divergence(output: Any, wanted: Any, temperature: float) -> Tensor:
    """``kd_divergence`` of logits, ``map_distance`` of maps; [B]."""
    if are_logits(output):
        return kd_divergence(output, wanted, temperature)
    return map_distance(output, wanted)


def multi_teacher_divergence(
    student_logits: Tensor, teacher_logits: list[Tensor], temperature: float
) -> Tensor:
    """``kd_divergence`` from every teacher; [B, teachers]."""
    columns = [kd_divergence(student_logits, logits, temperature) for logits in teacher_logits]
    return torch.stack(columns, dim=1)


def reconstruction_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over channels, averaged over positions; [B, C, ...] twice -> [B].

    What a block is reconstructed by (BRECQ, arXiv:2102.05426).
    """
    return (output - target).square().sum(1).reshape(len(output), -1).mean(1)
