"""How much each teacher counts for each image: DMKD's tiny network and what it minimizes.

The paper (doi:10.1007/978-981-99-8543-2_3) is known by its abstract: a tiny learnable
full-precision network produces the factors that balance the losses of the teachers. What the
network sees and what it minimizes is our reconstruction; each reading is a named choice here. Two
choices beside them learn nothing: what any learned weights have to beat.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

WeightInput = Literal["image", "logits", "bank", "static", "random"]
UNLEARNED = ("static", "random")  # of these
LEAST_SCORE = -10.0  # a teacher that is matched exactly counts e^10 times, and no more
Objective = Literal["softmax", "uncertainty", "entropy", "adversarial", "meta"]


class TeacherWeightNet(nn.Module):
    """Images [B, C, H, W], all logits [B, teachers + 1, classes] -> scores [B, teachers].

    ``kind`` says what it looks at: the "image" (three stride-2 convolutions and a linear layer),
    the "logits" of all teachers and the student (two linear layers; does not grow with the
    image), or nothing, a learned "bank" of one score a teacher. The last layer starts at zero, so
    that all teachers start equal.

    Two kinds have no parameters. "static": the softmax of the scores is ``static_weights`` over
    their sum, or equal weights where none are given. "random": it is drawn by ``rng`` for every
    image anew, evenly from all weights that sum to 1 (a Dirichlet distribution of ones).
    """

    scores: Tensor  # [teachers], of the kinds that have the same for every image

    def __init__(
        self,
        kind: WeightInput,
        teachers: int,
        channels: int,
        classes: int,
        *,
        static_weights: tuple[float, ...] = (),
        rng: torch.Generator | None = None,
    ):
        super().__init__()
        self.kind, self.teachers, self.rng = kind, teachers, rng
        if kind == "static":
            weights = torch.tensor(static_weights or (1.0,) * teachers)
            self.register_buffer("scores", weights.log())
        if kind == "bank":
            self.scores = nn.Parameter(torch.zeros(teachers))
        if kind not in ("image", "logits"):
            return
        if kind == "image":
            widths = (channels, 16, 32, 64)
            body: list[nn.Module] = []
            for narrow, wide in pairwise(widths):
                body += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.ReLU()]
            body += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            body = [nn.Flatten(), nn.Linear((teachers + 1) * classes, 64), nn.ReLU()]
        last = nn.Linear(64, teachers)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.body = nn.Sequential(*body, last)

    def forward(self, images: Tensor, logits: Tensor) -> Tensor:
        """Scores of the teachers for each image; the objective turns them into weights."""
        if self.kind in ("bank", "static"):
            return self.scores.expand(len(images), -1)
        if self.kind == "random":
            draws = torch.empty(len(images), self.teachers).exponential_(generator=self.rng)
            return draws.log().to(images.device)
        if self.kind == "image":
            return self.body(images)
        return self.body(logits.softmax(-1))


def weighted_divergence(
    divergence: Tensor, scores: Tensor, objective: Objective, entropy_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The student's loss [B] and the teachers' weights [B, teachers] behind it.

    With ``a = softmax(scores)`` and ``D`` = ``divergence`` [B, teachers]:

    - "softmax" (R1): ``sum_k a_k D_k``. Its gradient feeds whatever teacher is easiest to
      match, and ends in one teacher; here to show just that.
    - "uncertainty" (R2): ``sum_k exp(-s_k) D_k + s_k`` with ``s = scores`` (Kendall et al.,
      arXiv:1705.07115): the barrier ``s_k`` keeps every teacher in play. No score counts as less
      than ``LEAST_SCORE``.
    - "entropy" (R3): ``sum_k a_k D_k - entropy_weight * H(a)``.
    - "adversarial" (R4): ``sum_k a_k D_k`` that the scores climb and the student descends: weight
      goes to the teacher matched worst.
    - "meta" (R5): ``sum_k a_k D_k`` for the student alone. The scores learn from what a step of
      the student does to other images: add ``a @ teacher_effects(...)`` of ``meta.py``.
    """
    if objective == "uncertainty":
        scores = scores.clamp(min=LEAST_SCORE)
        precision = torch.exp(-scores)
        loss = (precision * divergence + scores).sum(1)
        return loss, precision / precision.sum(1, keepdim=True)
    if objective == "adversarial":
        scores = _reverse_gradient(scores)
    weights = scores.softmax(1)
    if objective == "meta":
        return (weights.detach() * divergence).sum(1), weights
    loss = (weights * divergence).sum(1)
    if objective == "entropy":
        loss = loss + entropy_weight * (weights * scores.log_softmax(1)).sum(1)
    return loss, weights


def weight_entropy(weights: Tensor) -> Tensor:
    """Mean entropy of the rows of [B, teachers], from 0 (one teacher rules) to 1 (all equal)."""
    teachers = weights.shape[1]
    if teachers == 1:
        return weights.new_ones(())
    entropy = -torch.special.xlogy(weights, weights).sum(1).mean()
    return entropy / math.log(teachers)


def _reverse_gradient(x: Tensor) -> Tensor:
    """``x`` forward, ``-gradient`` backward."""
    return 2 * x.detach() - x
