"""What a run tells while it works and when it is done.

``dfq.report.display`` needs rich and is not imported here.
"""

from dfq.report.recorder import DivergedError, Recorder

__all__ = ["DivergedError", "Recorder"]
