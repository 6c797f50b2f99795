"""A lost rank ends the job at once, with one line that says what happened and what to do."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

TIMEOUT = timedelta(seconds=45)  # a rank that hangs instead of dying is given up after this


def start(backend: str | None = None, timeout: timedelta = TIMEOUT, **options: Any) -> None:
    """dist.init_process_group (NCCL on GPUs, Gloo on CPUs) whose waits end before a minute."""
    dist.init_process_group(backend, timeout=timeout, **options)


@contextlib.contextmanager
def ends_clearly(hint: str = "restart from the last checkpoint") -> Iterator[None]:
    """Inside, losing another rank prints one line and ends this process with status 1.

    It ends by os._exit: orderly shutdown would wait for the rank that is gone.
    """
    try:
        yield
    except (RuntimeError, ConnectionError) as error:  # dist.DistError is a RuntimeError
        if not _lost_a_peer(error):
            raise
        reason = re.sub(r"^\[[^ ]*\] ", "", str(error).strip()).splitlines()[0].split(". ")[0]
        rank, world = dist.get_rank(), dist.get_world_size()
        sys.stderr.write(  # at once, so that lines of several ranks do not mix
            f"dsmoe: rank {rank} of {world} has lost another rank, so the job ends; {hint} "
            f"({reason})\n"
        )
        sys.stderr.flush()
        os._exit(1)


def _lost_a_peer(error: BaseException) -> bool:
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "timed out", "broken pipe", "gloo")
    return any(sign in text for sign in signs)
