"""`dsmoe bench gpu`: what this machine's GPU can do at most, and what our kernels make of it.

Calls are timed by CUDA graph, so that nobody waits for Python, and eagerly where that is what a
user of few tokens sees. Beside them the dense FFN by cuBLAS and the experts by torch._grouped_mm.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dsmoe_ext import ops
from dsmoe_ext.benchmarks.gpu_cases import FINE, LLAMA_7B, Layer, make_case
from dsmoe_ext.testing import Case

CALLS, ROUNDS = 5, 15  # in a graph, of a graph
TOKENS = (1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12288)
TRAINED = 512  # from so many tokens on the backward is timed too
EAGER = 64  # up to so many, calls without a graph
PROFILED = 14  # kernels of a call that are kept, the longest


def _elapsed(run: Callable[..., Any]) -> float:
    """Seconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def graph_seconds(call: Callable[..., Any], calls: int = CALLS) -> float:
    """Of one call, replayed in a CUDA graph: the median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    return statistics.median(_elapsed(graph.replay) / calls for _ in range(ROUNDS))


def eager_seconds(call: Callable[..., Any], calls: int = 50) -> float:
    """Of one call of many in a row, Python and launches included."""
    call()
    return _elapsed(lambda: [call() for _ in range(calls)]) / calls


def device() -> dict[str, Any]:
    """What the GPU says of itself."""
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "sms": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "torch": torch.__version__,
    }


def ceilings() -> dict[str, float]:
    """The numbers that everything else is divided by: cuBLAS on 8192 x 8192 in bf16 and exact fp32,
    a copy in DRAM and one within L2 (read and written bytes), and what a kernel costs that does
    nothing."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    wide = matrix.float()
    flops, wide_flops = (2 * 8192**3 / graph_seconds(lambda m=m: m @ m) for m in (matrix, wide))
    rates = []
    for size in (1 << 32, 1 << 22):
        source = torch.zeros(size, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        rates.append(2 * size / graph_seconds(lambda s=source, t=target: t.copy_(s)))
    nothing = torch.zeros(1, device="cuda")
    return {
        "matmul_flops": flops,
        "fp32_matmul_flops": wide_flops,
        "dram_bytes_per_second": rates[0],
        "l2_bytes_per_second": rates[1],
        "launch_seconds": graph_seconds(lambda: nothing.add_(1), calls=200),
    }


def operations(case: Case, products: int) -> float:
    """Of the active pairs, in so many products over H."""
    neurons = ((case.gates != 0) * case.expert_offsets.diff()).sum()
    return 2.0 * products * case.x.shape[1] * float(neurons)


def weight_bytes(case: Case) -> float:
    """Of the experts in use."""
    neurons = ((case.gates != 0).any(0) * case.expert_offsets.diff()).sum()
    return 3.0 * case.x.element_size() * case.x.shape[1] * float(neurons)


def op_calls(case: Case, save: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward that keeps what the backward wants, and the backward."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in case.inputs()]
    y = ops.sparse_ffn(*leaves, save_activations=save)

    def forward() -> Any:
        return ops.sparse_ffn(*leaves, save_activations=save)

    def backward() -> Any:
        return torch.autograd.grad(y, leaves[:5], case.dy, retain_graph=True)

    return forward, backward


def dense_call(case: Case) -> Callable[..., Any]:
    """The whole FFN, by cuBLAS."""
    down_proj = case.down_proj_t.t().contiguous()

    def call() -> Any:
        gated = F.silu(F.linear(case.x, case.gate_proj)) * F.linear(case.x, case.up_proj)
        return F.linear(gated, down_proj)

    return call


def grouped_call(case: Case) -> Callable[..., Any]:
    """Rows gathered and the three products by torch._grouped_mm; adding up per token left out."""
    experts, hidden = case.gates.shape[1], case.x.shape[1]
    tokens = (case.gates.t() != 0).nonzero()[:, 1]
    ends = (case.gates != 0).sum(0).cumsum(0).int()
    both = torch.cat([w.view(experts, -1, hidden) for w in (case.gate_proj, case.up_proj)], 1)
    down = case.down_proj_t.view(experts, -1, hidden)

    def call() -> Any:
        gate, up = torch._grouped_mm(case.x[tokens], both.transpose(1, 2), offs=ends).chunk(2, 1)
        return torch._grouped_mm(F.silu(gate) * up, down, offs=ends)

    return call


def router_call(case: Case) -> Callable[..., Any]:
    """Logits, scores and gates of a linear router."""
    experts, hidden = case.gates.shape[1], case.x.shape[1]
    weight = torch.randn(experts, hidden, device="cuda")
    return lambda: ops.route(torch.ops.dsmoe.router(case.x, weight, None), 0.5, case.expert_offsets)


def times(
    tokens: Sequence[int] = TOKENS, layers: tuple[Layer, ...] = (LLAMA_7B, FINE)
) -> Iterator[dict[str, Any]]:
    """A record for every number of tokens: {"forward": seconds, ..}, and rates of the forward."""
    for layer in layers:
        for num_tokens in tokens if layer is LLAMA_7B else (1, 16, 8192):
            yield _record(layer, num_tokens)


def _record(layer: Layer, num_tokens: int) -> dict[str, Any]:
    case, seconds = make_case(layer, num_tokens, "cuda"), {}

    def forward() -> Any:
        return ops.sparse_ffn(*case.inputs())

    with torch.no_grad():
        seconds["forward"] = graph_seconds(forward)
        seconds["router and route"] = graph_seconds(router_call(case))
        seconds["dense, cuBLAS"] = graph_seconds(dense_call(case))
        if num_tokens <= EAGER:
            seconds["forward, eager"] = eager_seconds(forward)
        if num_tokens >= TRAINED and len(set(layer.sizes)) == 1 and hasattr(torch, "_grouped_mm"):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # not on every GPU
                seconds["torch._grouped_mm"] = graph_seconds(grouped_call(case))
    if num_tokens >= TRAINED:
        for save in (True, False):
            saved = "saved" if save else "recomputed"
            calls = zip(("forward", "backward"), op_calls(case, save), strict=True)
            seconds |= {f"{name}, {saved}": eager_seconds(call, 10) for name, call in calls}
    return {
        "layer": layer.name,
        "tokens": num_tokens,
        "seconds": seconds,
        "forward_flops_per_second": operations(case, 3) / seconds["forward"],
        "weight_bytes_per_second": weight_bytes(case) / seconds["forward"],
    }


def kernels(call: Callable[..., Any]) -> dict[str, list[float]]:
    """{kernel: [seconds of a call, launches of a call]}, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    rows = {
        event.key[:100]: [event.device_time_total / 1e6 / CALLS, event.count / CALLS]
        for event in profiled.key_averages()
        if event.device_time_total
    }
    return dict(sorted(rows.items(), key=lambda row: -row[1][0])[:PROFILED])


def profiles() -> Iterator[tuple[str, dict[str, Any]]]:
    """Kernel by kernel: the forward of 1, 64 and 8192 tokens, and both ways of training."""
    with torch.no_grad():
        for num_tokens in (1, 64, 8192):
            case = make_case(LLAMA_7B, num_tokens, "cuda")
            yield f"forward, T {num_tokens}", kernels(lambda c=case: ops.sparse_ffn(*c.inputs()))
    case = make_case(LLAMA_7B, 8192, "cuda")
    for save in (True, False):
        saved = "saved" if save else "recomputed"
        for name, call in zip(("forward", "backward"), op_calls(case, save), strict=True):
            yield f"{name}, {saved}, T 8192", kernels(call)
