"""What a model's BatchNorm layers remember of the real data, and what they see now."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from dfq.types import InputError
from dfq_kernels import batch_norm

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class BNStatistics:
    """Per BatchNorm call of the latest forward, each [channels]: what was stored, what came.

    Variances are biased, as BatchNorm normalizes.
    """

    stored_mean: list[Tensor] = field(default_factory=list)
    stored_var: list[Tensor] = field(default_factory=list)
    batch_mean: list[Tensor] = field(default_factory=list)
    batch_var: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the latest forward."""
        for values in (self.stored_mean, self.stored_var, self.batch_mean, self.batch_var):
            values.clear()

    def record(self, layer: nn.Module, mean: Tensor, var: Tensor) -> None:
        """Add what one BatchNorm layer saw."""
        self.stored_mean.append(layer.get_buffer("running_mean"))
        self.stored_var.append(layer.get_buffer("running_var"))
        self.batch_mean.append(mean)
        self.batch_var.append(var)


@contextmanager
def capture_bn_statistics(model: nn.Module) -> Iterator[BNStatistics]:
    """Record what reaches the BatchNorm layers of ``model`` while the context is open.

    Each layer's forward is replaced by ``dfq_kernels.batch_norm``, which normalizes and measures
    in one read of the input; gradients flow through output and statistics. Every forward of
    ``model`` starts anew. The layers are themselves again when the context closes.

    Raises:
        InputError: if ``model`` has no BatchNorm with running statistics, or one in training mode.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    layers = {name: m for name, m in layers.items() if m.running_mean is not None}
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no BatchNorm layer with running statistics, so it "
            "remembers nothing of its data; give a model trained with BatchNorm."
        )
    for name, layer in layers.items():
        if layer.training:
            raise InputError(f"BatchNorm layer {name} is in training mode; call model.eval().")
    stats = BNStatistics()
    hook = model.register_forward_pre_hook(lambda *_: stats.clear())
    for layer in layers.values():
        object.__setattr__(layer, "forward", partial(_normalize, layer, stats.record))
    try:
        yield stats
    finally:
        hook.remove()
        for layer in layers.values():
            object.__delattr__(layer, "forward")


def _normalize(
    layer: nn.modules.batchnorm._BatchNorm,
    record: Callable[[nn.Module, Tensor, Tensor], None],
    x: Tensor,
) -> Tensor:
    stored_mean, stored_var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    y, mean, var = batch_norm(
        x, stored_mean, stored_var, layer.weight, layer.bias, layer.eps, False
    )
    record(layer, mean, var)
    return y
