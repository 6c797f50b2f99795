"""DSMOE_TRACE=file: what a run really asked of the ops, one JSON object a call, to be made again.

    {"op": "expert_mlp", "ms": 1.93, "arguments": {"x": {...}, "gates": {...}, "activation": 0}}

Of a tensor its shape, strides and dtype; of `gates` also how many tokens each expert got; of what
decides the work (`expert_offsets`, `threshold`) the values. No other number of the user's is there.
`dsmoe bench replay file` times the same calls on random numbers.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RECORDED_VALUES = ("expert_offsets", "threshold")


class Trace(TorchDispatchMode):
    """Appends every call of a dsmoe op in this thread, and in its backwards, to a file."""

    def __init__(self, path: Path | str):
        super().__init__()
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace != "dsmoe" or types:  # types: fake and other tensors that hold no numbers
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) and value.is_cuda for value in arguments.values()):
            torch.cuda.synchronize()
        row = {"op": func._opname, "ms": round(1e3 * (time.perf_counter() - start), 4)}
        row["arguments"] = {name: _described(name, value) for name, value in arguments.items()}
        self._file.write(json.dumps(row) + "\n")
        return result


def _described(name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    dtype = str(value.dtype).removeprefix("torch.")
    entry = {"shape": list(value.shape), "strides": list(value.stride()), "dtype": dtype}
    if name == "gates":
        entry["tokens_per_expert"] = (value != 0).sum(0).tolist()
    elif name in RECORDED_VALUES:
        entry["values"] = value.tolist()
    return entry


def rebuilt(
    name: str, entry: Any, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Any:
    """An argument like the recorded one, with random numbers where no values were written."""
    if not isinstance(entry, dict):
        return entry
    dtype = getattr(torch, entry["dtype"])
    if "values" in entry:
        return torch.tensor(entry["values"], dtype=dtype, device=device)
    if not dtype.is_floating_point:
        raise ValueError(f"a recorded call cannot be rebuilt without the values of {name}")
    shape, strides = entry["shape"], entry["strides"]
    held = [length if stride else 1 for length, stride in zip(shape, strides, strict=True)]
    tensor = torch.empty_strided(held, strides, dtype=dtype).normal_(generator=generator)
    tensor = tensor.expand(shape)
    if name == "gates":
        order = torch.rand(entry["shape"], generator=generator).argsort(0).argsort(0)
        tensor = tensor.abs().add(0.1) * (order < torch.tensor(entry["tokens_per_expert"]))
    return tensor.to(device)
