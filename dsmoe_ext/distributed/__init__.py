"""Experts over several devices or processes. START with experts.py."""

from dsmoe_ext.distributed.checkpoint import load, newest, save
from dsmoe_ext.distributed.experts import ParallelExperts
from dsmoe_ext.distributed.failure import ends_clearly, start
from dsmoe_ext.distributed.model import ParallelFFN, parallelize, whole
from dsmoe_ext.distributed.traffic import Traffic, count_bytes

__all__ = [
    "ParallelExperts",
    "ParallelFFN",
    "Traffic",
    "count_bytes",
    "ends_clearly",
    "load",
    "newest",
    "parallelize",
    "save",
    "start",
    "whole",
]
