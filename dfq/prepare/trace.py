"""The graph of a student, where one can be told."""

from __future__ import annotations

from torch import fx, nn

from dfq.prepare.frozen import evaluating


def trace(student: nn.Module) -> fx.Graph | None:
    """What ``student`` computes, layer by layer; None if it cannot be traced.

    None too if it computes something else in training mode than in eval mode: one graph could not
    speak for both.
    """
    graphs = []
    with evaluating(student):
        for training in (True, False):
            student.train(training)
            try:
                graphs.append(_Tracer().trace(student))
            except Exception:  # a foreign forward may do anything that a tracer cannot follow
                return None
    first, second = ([(n.op, n.target, str(n.args)) for n in graph.nodes] for graph in graphs)
    return graphs[1] if first == second else None


class _Tracer(fx.Tracer):
    """Goes into containers, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("dfq.prepare.")
        return ours or super().is_leaf_module(m, module_qualified_name)
