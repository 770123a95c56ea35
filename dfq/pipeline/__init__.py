"""The whole way from a float model to a quantized student, and the folder it is kept in."""

from dfq.pipeline.folder import load_student
from dfq.pipeline.inputs import Teacher, parse_teacher
from dfq.pipeline.provenance import Source
from dfq.pipeline.request import Request, resolve, resolve_device, suggest_config
from dfq.pipeline.run import Run, execute, quantize, quantized_models
from dfq.pipeline.synthesis import resolve_synthesis, synthesize

__all__ = [
    "Request",
    "Run",
    "Source",
    "Teacher",
    "execute",
    "load_student",
    "parse_teacher",
    "quantize",
    "quantized_models",
    "resolve",
    "resolve_device",
    "resolve_synthesis",
    "suggest_config",
    "synthesize",
]
