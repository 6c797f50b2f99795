"""Checkpoints by torch.distributed.checkpoint that load on any number of ranks.

Experts are saved under their numbers, each by the rank that owns it, everything else once: so what
one number of ranks wrote any other reads, whoever owns which expert there, equal sizes or not.

A checkpoint appears under its name only when it is whole: it is written beside and then renamed.
"""

import contextlib
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsmoe_ext.distributed.experts import WEIGHTS, ParallelExperts

PREFIX = "step-"


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: views of the model's and optimiser's own memory."""
    parallel = {n: m for n, m in model.named_modules() if isinstance(m, ParallelExperts)}
    state = {}
    parameters = dict(model.named_parameters())
    entries: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for name, parameter in parameters.items():
        for key, value in (optimizer.state[parameter] if optimizer else {}).items():
            entries[f"optimizer.{key}/{name}"] = value
    for name, value in entries.items():
        owner, _, leaf = name.rpartition("/")[2].rpartition(".")
        if owner not in parallel or leaf not in WEIGHTS or value.dim() == 0:
            state[name] = value.detach()
            continue
        experts, value = parallel[owner], value.detach()
        rows = value.to_local() if isinstance(value, DTensor) else value
        rows = rows.split(experts.own_sizes)
        for number, part in zip(experts.own_experts, rows, strict=True):
            state[f"{name}/expert-{number}"] = part
    return state


def save(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Path:
    """Writes folder/step-N together with all ranks, whole or not at all."""
    folder = Path(folder)
    whole, part = folder / f"{PREFIX}{step}", folder / f"{PREFIX}{step}.part"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    dcp.save(_tensors(model, optimizer), checkpoint_id=part)
    if dist.get_rank() == 0:
        shutil.rmtree(whole, ignore_errors=True)
        part.rename(whole)
    dist.barrier()
    return whole


def newest(folder: str | Path) -> tuple[int, Path] | None:
    """(step, path) of the last whole checkpoint, or None."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX}*"):
        with contextlib.suppress(ValueError):
            found[int(path.name.removeprefix(PREFIX))] = path
    return max(found.items(), default=None)


def load(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fills model and optimiser in place; each rank reads the experts that it owns.

    The optimiser's state must exist: an empty one makes it by a step with zero gradients, whose
    effects the loaded values then replace.
    """
    if optimizer is not None and not optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        dcp.load(_tensors(model, optimizer), checkpoint_id=path)
