"""One FFN on several ranks beside one process: what expert parallelism gains on one machine.

    torchrun --nproc-per-node 2 -m dsmoe_ext.benchmarks.ranks --tokens 512

Every rank has one thread and an equal part of the tokens and of the experts; the one process has
one thread and all of them. Rounds of both are interleaved, and the ranks compare their outputs.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsmoe_ext import distributed, sparse_ffn
from dsmoe_ext.benchmarks.machine import processor_name

EXPERTS = 8


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shape", default="2048/5632", help="H/I")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--active", type=float, default=0.5, help="experts a token uses, of all")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.start()
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))

    hidden, intermediate = map(int, options.shape.split("/"))
    torch.manual_seed(0)  # the same numbers on every rank
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    weights = [torch.randn(intermediate, hidden).mul_(0.02).to(dtype) for _ in range(3)]
    x = torch.randn(options.tokens, hidden).to(dtype)
    scores = torch.rand(options.tokens, EXPERTS)
    gates = (scores.argsort().argsort() < options.active * EXPERTS).float()
    sizes = [intermediate // EXPERTS] * EXPERTS
    offsets = torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32)
    experts = distributed.ParallelExperts(weights, sizes, [EXPERTS // world] * world, mesh)
    own = slice(options.tokens * rank // world, options.tokens * (rank + 1) // world)

    def one_process() -> torch.Tensor:
        gate_proj, up_proj, down_proj_t = weights
        return sparse_ffn(x, gates, gate_proj, up_proj, down_proj_t, offsets)

    whole = one_process()
    torch.testing.assert_close(experts(x[own], gates[own]), whole[own], rtol=0.05, atol=0.05)
    times: dict[str, list[float]] = {"one": [], "ranks": []}
    for _ in range(options.rounds):
        dist.barrier()
        if rank == 0:
            times["one"].append(seconds(one_process))
        dist.barrier()
        times["ranks"].append(seconds(lambda: experts(x[own], gates[own])))
    if rank == 0:
        one, ranks = (sorted(times[name]) for name in ("one", "ranks"))
        kind = f"{options.shape}, {options.dtype}, {options.tokens} tokens, {world} ranks"
        print(f"{processor_name()}, {kind}")
        for what, i in ("best", 0), ("median", len(one) // 2):
            print(
                f"{what}: one {one[i] * 1e3:.2f} ms, ranks {ranks[i] * 1e3:.2f} ms, "
                f"{one[i] / ranks[i]:.2f} x as fast"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
