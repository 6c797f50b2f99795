"""Times the calls that DSMOE_TRACE wrote, on random numbers, beside the time they took there."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsmoe_ext import ops
from dsmoe_ext.benchmarks.timing import Timing, interleaved
from dsmoe_ext.errors import UserError
from dsmoe_ext.trace import rebuilt


@dataclass(frozen=True)
class Call:
    """Equal calls of one op: how often, and the median of their times in the recorded run."""

    op: str
    arguments: dict[str, Any]
    count: int
    recorded_ms: float

    @property
    def num_tokens(self) -> int:
        first = next(entry for entry in self.arguments.values() if isinstance(entry, dict))
        return first["shape"][0]

    @property
    def active(self) -> float | None:
        """Share of all (token, expert) pairs that were active, where the op takes gates."""
        gates = self.arguments.get("gates")
        if not gates or not self.num_tokens:
            return None
        return sum(gates["tokens_per_expert"]) / (gates["shape"][0] * gates["shape"][1])


def read_trace(path: Path) -> list[Call]:
    """The distinct calls of a trace, the one that took most time in all first."""
    times: dict[tuple[str, str], list[float]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            key = (row["op"], json.dumps(row["arguments"]))
            times.setdefault(key, []).append(row["ms"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no trace that DSMOE_TRACE wrote: {error}") from None
    calls = [
        Call(op, json.loads(arguments), len(ms), statistics.median(ms))
        for (op, arguments), ms in times.items()
    ]
    return sorted(calls, key=lambda call: -call.count * call.recorded_ms)


def replay(call: Call, budget: float, seed: int = 0) -> Timing:
    """Times one call for about `budget` seconds."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {
        name: rebuilt(name, entry, generator)
        for name, entry in call.arguments.items()
        if name != "packed"
    }
    if "packed" in call.arguments:
        shape = (arguments["intermediate_size"], arguments["hidden_size"])
        dtype = arguments["x"].dtype
        gate, up, down = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        packed = ops.pack_weights(gate, up, down, arguments["expert_offsets"])
        arguments["packed"] = packed.data
    op = getattr(torch.ops.dsmoe, call.op)
    with torch.no_grad():
        return interleaved({call.op: [lambda: op(**arguments)]}, budget)[call.op]
