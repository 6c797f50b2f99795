"""A CUDA graph may capture the ops: nothing waits for the device, allocates or copies, all goes to
the stream that is given, and no launch depends on what is in device memory."""

import pytest
import torch
from interpreted import STREAM, Interpreter
from ops_under_test import ON_GPU, interpreter_only

from dsmoe_ext.testing import offsets_of, random_case

# None of these is refused while a stream is captured. What the launchers call besides does not
# even link: see fake_runtime.cpp.
QUESTIONS = {
    "cudaGetLastError",
    "cudaGetDevice",
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaGetDriverEntryPointByVersion",
}
RUNS = [
    (torch.bfloat16, "80"),
    (torch.float16, "80"),
    (torch.float32, "80"),
    (torch.bfloat16, "90a"),
    (torch.float16, "90a"),
]


def run_all(ops, tokens, dtype, seed, sizes):
    """All ops, forward and backward, on values that the seed decides."""
    g = torch.Generator().manual_seed(seed)
    offsets = offsets_of(sizes)
    for method in ("threshold", "top_p", "top_k", "relu"):
        logits = torch.randn(tokens, len(sizes), generator=g)
        gates, scores = ops.route(logits, torch.rand(()).item(), offsets, method=method, top_k=2)
        ops.route_backward(gates, scores, gates, scores, offsets, method=method, top_k=2)
    case = random_case(seed, tokens, 40, sizes, active=(seed + 1) / 4, exact_ste=True, dtype=dtype)
    weight, dlogits = (torch.randn(*shape, generator=g) for shape in ((3, 40), (tokens, 3)))
    ops.router(case.x, weight)
    ops.router_backward(dlogits, case.x, weight)
    ops.permute(case.gates)
    ops.sparse_ffn(*case.inputs())
    ops.sparse_ffn_backward(*case.inputs(), dy=case.dy, grad_weight=case.grad_weight)
    return ops


@interpreter_only
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype, arch", RUNS, ids=str)
def test_calls_of_the_runtime(dtype, arch, tokens):
    ops = run_all(Interpreter(arch=arch), tokens, dtype, 0, [16, 72, 8])
    on_a_stream = {name for name, stream in ops.calls if stream is not None}
    assert on_a_stream == {"cudaLaunchKernel"}
    assert {stream for name, stream in ops.calls if name in on_a_stream} == {STREAM}
    assert {name for name, _ in ops.calls} - on_a_stream <= QUESTIONS


@interpreter_only
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype, arch", RUNS, ids=str)
def test_launches_do_not_depend_on_device_memory(dtype, arch, tokens):
    """Kernels, grids and every byte of the parameters: the same for other gates, other numbers, and
    other sizes of as many experts."""
    launches = [
        run_all(Interpreter(arch=arch), tokens, dtype, seed, sizes).launches
        for seed, sizes in ((0, [16, 72, 8]), (2, [64, 0, 32]))
    ]
    assert launches[0] == launches[1]


@pytest.mark.skipif(not ON_GPU, reason="captures a graph")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_captured_graph_follows_its_inputs(tokens, dtype):
    from dsmoe_ext import ops

    first, second = (random_case(s, tokens, 40, [16, 72, 8], dtype=dtype) for s in (0, 1))
    x, _, *weights = (t.cuda() for t in first.inputs())
    threshold = torch.tensor(0.5, device="cuda")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 3, generator=g).cuda()

    def run():
        gates = ops.route(logits, threshold, weights[-1])[0]
        return ops.sparse_ffn(x, gates, *weights)

    with torch.inference_mode():
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()  # what happens only once is not captured
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        logits.copy_(torch.randn(tokens, 3, generator=g))
        x.copy_(second.x)
        graph.replay()
        assert torch.equal(y, run())
