"""Block reconstruction: each unit of a student learns to answer as the same unit of its teacher.

BRECQ (arXiv:2102.05426), with QDrop (arXiv:2203.05740) and the schedule of GENIE-M
(arXiv:2212.04780, from the description of its released code). That code runs both networks from the
images on for every unit; here a unit finds its inputs where the units before it left them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfq.bounds import COUNT, NOT_ALL, NOT_NEGATIVE, POSITIVE, SHARE
from dfq.descent import anneal, descend
from dfq.distill.blocks import Plan
from dfq.distill.losses import reconstruction_error
from dfq.hooks import removing
from dfq_kernels import fake_quantize

logger = logging.getLogger("dfq")


@dataclass(frozen=True)
class ReconstructionConfig:
    """How a unit learns; the defaults are ours, ``GENIE_RECONSTRUCTION`` the paper's.

    Rates and weight were chosen on ResNet-20 at W3A3 and W2A4 for few steps, by the divergence from
    the teacher on images distilled with another seed.

    Attributes:
        steps: steps for each unit.
        batch_size: images of a step.
        lr: Adam's rate for the rounding.
        weight_scale_lr: for the logarithms of the weights' scales, falling to 0 by a half cosine.
        input_scale_lr: for those of the activations, likewise.
        drop: probability that an activation of the student stays float (QDrop), and that an element
            of the unit's input is the teacher's.
        warmup: share of the steps without the pull towards hard rounding.
        beta: exponent of that pull after the warm-up and at the end, linear between.
        rounding_weight: weight of that pull.
        relative: the pull is averaged over the weights and counts in units of the unit's error, so
            that one weight suits units large and small; the released code sums and weighs by 1.
    """

    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-2
    weight_scale_lr: float = 2e-3
    input_scale_lr: float = 2e-3
    drop: float = 0.5
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    rounding_weight: float = 1000.0
    relative: bool = True

    def __post_init__(self) -> None:
        COUNT.check(steps=self.steps, batch_size=self.batch_size)
        NOT_NEGATIVE.check(
            lr=self.lr,
            weight_scale_lr=self.weight_scale_lr,
            input_scale_lr=self.input_scale_lr,
            rounding_weight=self.rounding_weight,
        )
        SHARE.check(drop=self.drop)
        NOT_ALL.check(warmup=self.warmup)
        POSITIVE.check(beta=self.beta)


GENIE_RECONSTRUCTION = ReconstructionConfig(  # the released code's
    steps=20_000,
    lr=1e-3,
    weight_scale_lr=1e-3,  # theirs: 1e-4 for the scale itself, here for a scale of about 0.1
    input_scale_lr=4e-4,  # theirs: 4e-5, likewise
    rounding_weight=1.0,
    relative=False,
)


class Unit(NamedTuple):
    """A stretch of the student with all that it needs in order to learn.

    Attributes:
        layers: names of the layers that it holds.
        student: the stretch over the student's own modules, one tensor in, one out.
        inputs: what the student so far feeds it, [N, ...].
        float_inputs: what the teacher feeds its own stretch, [N, ...].
        targets: what the teacher's answers, [N, ...].
    """

    layers: tuple[str, ...]
    student: nn.Module
    inputs: Tensor
    float_inputs: Tensor
    targets: Tensor


class Knobs(NamedTuple):
    """What a unit learns, and what its quantizers do meanwhile.

    Attributes:
        rounding: parameters of the rounding.
        weight_scales: logarithms of the weights' scales.
        input_scales: logarithms of the activations' scales.
        penalty: how undecided the rounding is, [], for an exponent.
        redraw: draws which activations stay float; called before every step.
    """

    rounding: Sequence[Tensor]
    weight_scales: Sequence[Tensor]
    input_scales: Sequence[Tensor]
    penalty: Callable[[float], Tensor]
    redraw: Callable[[], None]


def reconstruction_units(
    teacher: nn.Module,
    student: nn.Module,
    plan: Plan | None,
    layers: Sequence[str],
    images: Tensor,
    *,
    batch_size: int = 64,
) -> Iterator[Unit]:
    """Yield the units of ``student`` in order; each is to learn before the next is asked for.

    Without a plan, since the model cannot be traced, it is reconstructed layer by layer in the
    order in which it runs them; it then runs as a whole for each of them, and a warning says so.

    Args:
        teacher: float, frozen, in eval mode.
        student: of the same graph and module names.
        plan: units of both.
        layers: names of the layers to reconstruct.
        images: [N, ...], on the device of both.
        batch_size: images in flight outside of training.
    """
    if plan is not None:
        return _by_plan(plan, teacher, student, images, batch_size)
    logger.warning(
        "the model cannot be traced, so that its layers are reconstructed one by one instead of "
        "block by block."
    )
    return _by_hooks(teacher, student, layers, images.split(batch_size))


def reconstruct(
    unit: Unit,
    knobs: Knobs,
    config: ReconstructionConfig,
    *,
    rng: torch.Generator,
    report: Callable[..., None],
) -> None:
    """Turn ``knobs`` so that the unit's error falls.

    Minimizes ``mean reconstruction_error + rounding_weight * penalty(beta)``, the second part after
    the warm-up and, if ``relative``, divided by the number of weights and times the error itself,
    as a constant. Each element of the input is the student's or, with probability ``drop``, the
    teacher's. ``rng`` is a CPU generator; ``report`` takes step, error and the share of undecided
    roundings.
    """
    device = unit.inputs.device
    rounding = torch.optim.Adam(knobs.rounding, lr=config.lr)
    scales = torch.optim.Adam(
        [
            {"params": list(knobs.weight_scales), "lr": config.weight_scale_lr},
            {"params": list(knobs.input_scales), "lr": config.input_scale_lr},
        ]
    )
    weights = sum(part.numel() for part in knobs.rounding)
    for step in range(config.steps):
        anneal(scales, step / config.steps)
        index = torch.randperm(len(unit.inputs), generator=rng)[: config.batch_size].to(device)
        seed = torch.randint(2**62, (1,), generator=rng).to(device)
        x = mixed(unit.inputs[index], unit.float_inputs[index], config.drop, seed)
        knobs.redraw()
        error = reconstruction_error(unit.student(x), unit.targets[index]).mean()
        undecided = knobs.penalty(_beta(step / config.steps, config))
        weight = config.rounding_weight * (step >= config.warmup * config.steps)
        pull = weight * undecided * (error.detach() / weights if config.relative else 1.0)
        descend(error + pull, rounding, scales)
        report(step + 1, error=error.detach(), undecided=undecided.detach() / weights)


def mixed(inputs: Tensor, others: Tensor, share: float, seed: Tensor) -> Tensor:
    """``inputs`` with each element replaced by that of ``others`` with probability ``share``.

    QDrop's mask is ``fake_quantize``'s: on a grid this coarse all that is not dropped is 0.
    """
    coarse, zero = inputs.new_full((1,), 2.0**100), inputs.new_zeros(1)
    kept = fake_quantize(others - inputs, coarse, zero, -1, 1, drop=share, seed=seed)
    return inputs + kept


def _beta(fraction: float, config: ReconstructionConfig) -> float:
    first, last = config.beta
    way = (fraction - config.warmup) / (1 - config.warmup)
    return first + (last - first) * min(max(way, 0.0), 1.0)


def _by_plan(
    plan: Plan, teacher: nn.Module, student: nn.Module, images: Tensor, batch_size: int
) -> Iterator[Unit]:
    last_use = {name: step for step in plan.steps for name in step.inputs}
    floats: dict[str, Any] = {plan.images: images}
    values: dict[str, Any] = {plan.images: images}
    count = len(images.split(batch_size))
    for step in plan.steps:
        float_output = _run(step.module(teacher), floats, step.inputs, batch_size, count)
        module = step.module(student)
        if step.layers:
            (entry,) = step.inputs
            yield Unit(step.layers, module, values[entry], floats[entry], float_output)
        output = _run(module, values, step.inputs, batch_size, count)
        floats[step.output], values[step.output] = float_output, output
        for name in step.inputs:
            if last_use[name] is step:
                del floats[name], values[name]


@torch.no_grad()
def _run(
    module: nn.Module, values: dict[str, Any], names: Iterable[str], size: int, count: int
) -> Any:
    """The module's output for all images, batch by batch: a tensor, or a list of what it gave."""
    batches = [_batches(values[name], size) for name in names]
    outputs = [module(*(batch[index] for batch in batches)) for index in range(count)]
    return torch.cat(outputs) if all(isinstance(o, Tensor) and o.ndim for o in outputs) else outputs


def _batches(value: Any, size: int) -> Sequence[Any]:
    return value.split(size) if isinstance(value, Tensor) else value


def _by_hooks(
    teacher: nn.Module, student: nn.Module, layers: Sequence[str], batches: Sequence[Tensor]
) -> Iterator[Unit]:
    order: list[str] = []
    hooks = removing(
        teacher.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: order.append(name)
        )
        for name in layers
    )
    with hooks, torch.no_grad():
        teacher(batches[0][:1])
    for name in dict.fromkeys(order):
        float_inputs, targets = _seen(teacher, name, batches)
        layer = student.get_submodule(name)
        inputs, _ = _seen(student, name, batches)
        yield Unit((name,), layer, inputs, float_inputs, targets)


@torch.no_grad()
def _seen(model: nn.Module, name: str, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the layer takes and gives while ``model`` runs; its first call if there are several."""
    calls: list[tuple[Tensor, Tensor]] = []
    firsts = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda layer, args, output: calls.append((args[0], output))
    )
    with hook:
        for batch in batches:
            calls.clear()
            model(batch)
            firsts.append(calls[0])
    inputs, outputs = zip(*firsts, strict=True)
    return torch.cat(inputs), torch.cat(outputs)
