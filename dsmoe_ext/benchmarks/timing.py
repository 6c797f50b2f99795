"""Interleaved timing: all methods in one process, in turn, round by round, so that noise of the
machine meets them alike. What is compared is the ratio of minima; the spread shows the noise."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MIN_ROUNDS, MAX_ROUNDS = 5, 400


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: fastest, median, and 90th percentile over all rounds."""

    best: float
    median: float
    slow: float


def waiter(device: str) -> Callable[..., Any]:
    """Waits for what was asked of the device: of a GPU, a call returns before it is done."""
    import torch

    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def interleaved(
    methods: dict[str, list[Callable[..., Any]]], budget: float, device: str = "cpu"
) -> dict[str, Timing]:
    """Times every method for about `budget` seconds in all.

    A method is a list of callables that take turns: the same work on other inputs and other copies
    of the weights, so that small weights do not sit in the cache as they never would in a model.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    wait = waiter(device)
    for turns in methods.values():
        for call in turns:
            call()
    wait()
    start, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or (time.perf_counter() - start < budget and rounds < MAX_ROUNDS):
        for name, turns in methods.items():
            call = turns[rounds % len(turns)]
            begin = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - begin)
        rounds += 1
    return {
        name: Timing(min(s), statistics.median(s), sorted(s)[int(0.9 * (len(s) - 1))])
        for name, s in seconds.items()
    }
