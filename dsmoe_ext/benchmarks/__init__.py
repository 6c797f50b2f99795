"""`dsmoe bench ...`: check against the reference first, then time, beside the baselines."""

from .commands import app

__all__ = ["app"]
