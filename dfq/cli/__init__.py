"""The command ``dfq``; importing it needs the standard library alone."""

from dfq.cli.dispatch import main

__all__ = ["main"]
