"""Pytest plugin, ``-p tests.kernels.as_a_gpu``: Triton's interpreter rounds as a GPU does.

For runs that do not pass through conftest.py: the dry run of bench/gpu_day.py.
"""

from tests.kernels.conftest import _round_bfloat16_as_a_gpu


def pytest_configure() -> None:
    """Before any kernel is interpreted."""
    _round_bfloat16_as_a_gpu()
