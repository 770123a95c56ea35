"""What is recorded of one comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation against one baseline; a case without baselines has one row."""

    op: str
    ops: tuple[str, ...]  # that took part
    case: str
    size: str
    backend: str
    device: str
    threads: int
    us: float
    us_p20: float
    us_p80: float
    ns_per_element: float
    gb_per_s: float | None  # of the bytes that must be moved at least
    of_copy_bandwidth: float | None  # on a GPU
    of_copy_aim: float | None
    baseline: str | None = None
    baseline_us: float | None = None
    ratio: float | None = None
    aim: float | None = None
    kind: str = "bench"  # among the records of roofs and stages

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.heading()} alone"
        aim = "" if self.aim is None else f", aim {self.aim:g}"
        return f"{self.heading()} {self.ratio:.2f}x {self.baseline}{aim}"

    def heading(self) -> str:
        """What it has in common with the rows of other baselines."""
        name = f"{self.op}, {self.case}, {self.size}, {self.backend}:"
        time = f"{self.us:.1f} us, {self.ns_per_element:.4f} ns/element"
        of_copy = self.of_copy_bandwidth
        return f"{name} {time}" + ("" if of_copy is None else f", {of_copy:.0%} of a copy")

    @property
    def missed(self) -> bool:
        """Whether the ratio to the baseline is below its aim."""
        return self.ratio is not None and self.aim is not None and self.ratio < self.aim
