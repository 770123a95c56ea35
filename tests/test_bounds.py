from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from dfq.bounds import BITS, COUNT, NOT_ALL, NOT_NEGATIVE, POSITIVE, SHARE, SOME
from dfq.methods import METHODS
from dfq.synthesize.pool import gather
from dfq.types import InputError

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (COUNT, "at least 1", (1, 10**9), (0, -1)),
        (NOT_NEGATIVE, "at least 0", (0, 0.0, 1e9), (-1e-9,)),
        (POSITIVE, "above 0", (1e-9, 1e9), (0, -1)),
        (SHARE, "0 to 1", (0, 0.5, 1), (-0.1, 1.1)),
        (SOME, "above 0 and at most 1", (0.1, 1), (0, 1.1)),
        (NOT_ALL, "at least 0 and below 1", (0, 0.9), (-0.1, 1)),
        (BITS, "2 to 8", (2, 8), (1, 9)),
    ],
)
def test_numbers_out_of_bounds_are_called_by_their_name(bounds, text, inside, outside):
    bounds.check(one=inside[0], all=inside, none=None, nothing=())
    for number in (*outside, NAN, INFINITE, -INFINITE):
        with pytest.raises(InputError, match=f"^it must be {text}, got {number}.$"):
            bounds.check(fine=inside[0], it=number)
        with pytest.raises(InputError, match=f"^it must be {text}, got "):
            bounds.check(it=(inside[0], number))


CONFIGS = {
    f"{name}-{kind}-{effort}": config
    for name, method in METHODS.items()
    for kind, efforts in (("classes", method.efforts), ("maps", method.maps or {}))
    for effort, config in efforts.items()
}


def _numbers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number of ``config`` and of the configs in it, and what takes its place."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, here = getattr(config, field.name), (*path, field.name)
        kinds = {hints[field.name], *get_args(hints[field.name])}
        if is_dataclass(value):
            yield from _numbers(value, here)
        elif kinds & {int, float}:
            for wrong in (-1, NAN) if float in kinds else (-1,):
                yield here, (wrong,) * max(1, len(value)) if isinstance(value, tuple) else wrong


def _with(config: Any, path: tuple[str, ...], value: Any) -> Any:
    first, *rest = path
    return replace(config, **{first: _with(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_that_is_a_flag_has_bounds(name):
    """Or a rate of -1 is found out when the images are made already, or never."""
    numbers = list(_numbers(CONFIGS[name]))
    assert numbers
    for path, wrong in numbers:
        with pytest.raises(InputError, match=path[-1]):
            _with(CONFIGS[name], path, wrong)


def test_no_batches_make_no_images():
    with pytest.raises(InputError, match="set batches to at least 1"):
        gather([])
