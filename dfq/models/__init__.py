"""MODEL strings -> frozen, checked float models in eval mode.

``cifar:resnet20``, ``torchvision:NAME``, ``timm:NAME``, ``package.module:function`` or
``path/file.py:function``.
"""

from dfq.models.build import build
from dfq.models.check import check
from dfq.models.load import freeze, load

__all__ = ["build", "check", "freeze", "load"]
