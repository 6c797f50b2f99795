"""`dsmoe experiment ...`: the measurements behind docs/experiments.md, one command per table."""

from .commands import app

__all__ = ["app"]
