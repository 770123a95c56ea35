"""What papers report, to stand beside what we measured; never in place of it.

Drops in points of top-1 from the float model of the same paper, since the float models differ:
CIFAR-10 ResNet-20 has 93.9 there.
"""

from __future__ import annotations

# (model, protocol, bits): (drop, what reports it)
PUBLISHED: dict[tuple[str, str, str], tuple[tuple[float, str], ...]] = {
    ("cifar:resnet20", "gdfq", "w4a4"): (
        (3.8, "GDFQ"),  # 90.11 of 93.89, table of AdaDFQ
        (2.4, "IntraQ"),  # 91.49
        (1.5, "HAST"),  # 92.36
        (1.1, "SynQ"),  # 92.76, mean of 5 seeds
    ),
    ("cifar:resnet20", "gdfq", "w3a3"): (
        (18.8, "GDFQ"),  # 75.11, re-run by AdaDFQ
        (16.8, "IntraQ"),  # 77.07
        (5.8, "SynQ"),  # 88.11
        (5.5, "HAST"),  # 88.34
    ),
}
