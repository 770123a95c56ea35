"""One file per published method; each reads top to bottom like its paper's algorithm box.

``recipe`` is none of them: it is what dfq does when no method is named.

A method is ``(teacher, student, data, config, *, rng, report) -> (student, images)``: ``teacher``
is float, frozen and in eval mode, ``student`` comes from ``dfq.prepare.prepare`` and is trained in
place, ``rng`` is a CPU generator. With ``given`` images it learns from those and makes none.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dfq.methods.ddaq import DDAQ_EFFORTS, DDAQ_MAPS, DDAQConfig, ddaq
from dfq.methods.dmkd import DMKD_EFFORTS, DMKDConfig, dmkd
from dfq.methods.gdfq import GDFQ_EFFORTS, GDFQConfig, gdfq, gdfq_images
from dfq.methods.genie import GENIE_EFFORTS, GENIE_MAPS, GENIEConfig, genie, genie_images
from dfq.methods.lis import LIS_EFFORTS, LISConfig, lis, lis_images
from dfq.methods.recipe import recipe, recipe_images
from dfq.methods.recipe_config import RECIPE_EFFORTS, RECIPE_MAPS, RecipeConfig
from dfq.methods.squant import SQUANT_EFFORTS, SQuantConfig, squant
from dfq.types import Images


class Method(NamedTuple):
    """A method and what may be asked of it.

    Attributes:
        run: the function.
        efforts: its configs: quick, default, full, and the paper's own.
        synthesize: makes its images alone, ``(teacher, data, config, *, count, rng, report)``;
            None where they follow the student.
        takes_teachers: whether both functions take further ``teachers``, from which the images
            are made too.
        maps: its configs for a model without classes, which gives maps; None: it serves none.
    """

    run: Callable[..., Any]
    efforts: Mapping[str, Any]
    synthesize: Callable[..., Images] | None = None
    takes_teachers: bool = False
    maps: Mapping[str, Any] | None = None


METHODS = {
    "ddaq": Method(ddaq, DDAQ_EFFORTS, maps=DDAQ_MAPS),
    "dmkd": Method(dmkd, DMKD_EFFORTS),
    "gdfq": Method(gdfq, GDFQ_EFFORTS, gdfq_images),
    "genie": Method(genie, GENIE_EFFORTS, genie_images, maps=GENIE_MAPS),
    "lis": Method(lis, LIS_EFFORTS, lis_images, takes_teachers=True),
    "recipe": Method(recipe, RECIPE_EFFORTS, recipe_images, takes_teachers=True, maps=RECIPE_MAPS),
    "squant": Method(squant, SQUANT_EFFORTS),
}

__all__ = [
    "METHODS",
    "DDAQConfig",
    "DMKDConfig",
    "GDFQConfig",
    "GENIEConfig",
    "LISConfig",
    "Method",
    "RecipeConfig",
    "SQuantConfig",
    "ddaq",
    "dmkd",
    "gdfq",
    "genie",
    "lis",
    "recipe",
    "squant",
]
