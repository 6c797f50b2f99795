"""Routers: what decides, for every token, which experts it uses."""

from dsmoe_ext.routers.linear import (
    ROUTERS,
    LinearRouter,
    NoisyRouter,
    at_least_float32,
    without_half_casts,
)

__all__ = ["ROUTERS", "LinearRouter", "NoisyRouter", "at_least_float32", "without_half_casts"]
