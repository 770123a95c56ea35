"""One file per published method; each reads top to bottom like its paper's algorithm box.

``recipe`` is none of them: it is what dfq does when no method is named.

A method is ``(teacher, student, data, config, *, rng, report) -> (student, images)``: ``teacher``
is float, frozen and in eval mode, ``student`` comes from ``dfq.prepare.prepare`` and is trained in
place, ``rng`` is a CPU generator.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dfq.methods.ddaq import DDAQ_EFFORTS, DDAQConfig, ddaq
from dfq.methods.dmkd import DMKD_EFFORTS, DMKDConfig, dmkd
from dfq.methods.gdfq import GDFQ_EFFORTS, GDFQConfig, gdfq
from dfq.methods.genie import GENIE_EFFORTS, GENIEConfig, genie
from dfq.methods.recipe import RECIPE_EFFORTS, RecipeConfig, recipe
from dfq.methods.squant import SQUANT_EFFORTS, SQuantConfig, squant


class Method(NamedTuple):
    """A method and its configs by effort: quick, default, full, and the paper's own."""

    run: Callable[..., Any]
    efforts: Mapping[str, Any]


METHODS = {
    "ddaq": Method(ddaq, DDAQ_EFFORTS),
    "dmkd": Method(dmkd, DMKD_EFFORTS),
    "gdfq": Method(gdfq, GDFQ_EFFORTS),
    "genie": Method(genie, GENIE_EFFORTS),
    "recipe": Method(recipe, RECIPE_EFFORTS),
    "squant": Method(squant, SQUANT_EFFORTS),
}

__all__ = [
    "METHODS",
    "DDAQConfig",
    "DMKDConfig",
    "GDFQConfig",
    "GENIEConfig",
    "Method",
    "RecipeConfig",
    "SQuantConfig",
    "ddaq",
    "dmkd",
    "gdfq",
    "genie",
    "recipe",
    "squant",
]
