"""The whole way from a float model to a quantized student, and the folder it is kept in."""

from dfq.pipeline.folder import load_student
from dfq.pipeline.provenance import Source
from dfq.pipeline.request import Request, resolve, resolve_device, suggest_config
from dfq.pipeline.run import Run, execute, quantize

__all__ = [
    "Request",
    "Run",
    "Source",
    "execute",
    "load_student",
    "quantize",
    "resolve",
    "resolve_device",
    "suggest_config",
]
