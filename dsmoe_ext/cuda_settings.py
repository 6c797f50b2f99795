"""How the CUDA kernels cut their work, for the whole process: docs/gpu.md has a table of them.

The defaults are right unless something else needs the GPU too. Results stay within the tolerances
of the tests whatever is set, but another path, other parts, another number of multiprocessors or
less workspace may give other bits. A call takes them once, at its start.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from dsmoe_ext import _C

PATHS = ("best", "sm80", "sm90a")


@dataclass(frozen=True)
class CudaSettings:
    """Raises ValueError, naming the variable, for what the kernels cannot do."""

    # Of expert_mlp and its backward, which go in passes; a sum for every multiprocessor, 0.25 MiB
    # each (Hopper: 0.375), is wanted at least.
    workspace_mib: float = 256.0
    group: int = 1024  # pairs of every expert, or columns of H, before the next ones: what L2 holds
    sms: int = 0  # whose work expert_mlp is cut for, 0: all; by wgmma the others stay free (NCCL)
    path: str = "best"  # of half types: "sm80" is mma.sync on any GPU, "sm90a" wgmma or an error
    parts: int = 8  # CTAs that may share a sum of `down` where tokens are few; other bits for each
    router_tiles: int = 1024  # so many of the router's 8 x 8 tiles fill the GPU

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if isinstance(default, int) and (not isinstance(value, int) or value is True):
                _expect(field.name, False, f"a whole number, but is {value!r}")
        # below 1/4 MiB tables alone would not fit; beyond 64 GiB 32-bit indices would not do
        _expect("workspace_mib", 0.25 <= self.workspace_mib <= 2**16, "0.25 to 65536")
        _expect("group", 1 <= self.group < 2**30, "1 or more")
        _expect("sms", 0 <= self.sms < 2**16, "0 (all) or more")
        _expect("path", self.path in PATHS, f"one of {', '.join(PATHS)}")
        _expect("parts", 1 <= self.parts <= 8, "1 to 8")
        _expect("router_tiles", 1 <= self.router_tiles < 2**30, "1 or more")


def _variable(field: str) -> str:
    return f"DSMOE_CUDA_{field.upper()}"


def _expect(field: str, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{_variable(field)} must be {what}.")


def from_environment(environment: Mapping[str, str] = os.environ) -> CudaSettings:
    """What DSMOE_CUDA_WORKSPACE_MIB, _GROUP, _SMS, _PATH, _PARTS and _ROUTER_TILES say, else
    defaults."""
    given: dict[str, Any] = {}
    for field in fields(CudaSettings):
        text = environment.get(_variable(field.name))
        if not text:
            continue
        try:
            given[field.name] = type(getattr(CudaSettings, field.name))(text)
        except ValueError:
            raise ValueError(
                f"{_variable(field.name)} must be a number, but is {text!r}."
            ) from None
    return CudaSettings(**given)


_current = CudaSettings()


def apply(settings: CudaSettings) -> None:
    """For calls from now on. Without effect where the build has no CUDA."""
    global _current
    if _C.build_info()["cuda"]:
        _C.set_cuda_settings(
            int(settings.workspace_mib * 2**20),
            settings.group,
            settings.router_tiles,
            settings.sms,
            PATHS.index(settings.path),
            settings.parts,
        )
    _current = settings


@contextlib.contextmanager
def cuda_settings(**changes: Any) -> Iterator[CudaSettings]:
    """Other settings for the calls inside, `with cuda_settings(path="sm80"): ...`."""
    before = _current
    apply(replace(before, **changes))
    try:
        yield _current
    finally:
        apply(before)
