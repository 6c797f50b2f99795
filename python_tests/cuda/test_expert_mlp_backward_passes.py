"""The backward cut into passes over tokens and neurons, so that its workspace stays bounded."""

import pytest
import torch
from interpreted import Interpreter
from ops_under_test import Ops, interpreter_only
from test_expert_mlp import SIZES
from test_expert_mlp_backward import (
    check,
    gradients,
    in_both_loops,
    types_in_their_loops,
)

from dsmoe_ext import reference
from dsmoe_ext.benchmarks.gpu_backward import cut
from dsmoe_ext.benchmarks.gpu_load import Load
from dsmoe_ext.testing import random_case

SMALL_WORKSPACE = dict(workspace_mib=0.375)


def terms_of_dgates(case):
    """Of every pair, the sum of |a da| over the expert's neurons."""
    c = case.to(torch.float64)
    g, u, da = (t @ w.t() for t, w in ((c.x, c.gate_proj), (c.x, c.up_proj), (c.dy, c.down_proj_t)))
    terms = (torch.nn.functional.silu(g) * u * da).abs()
    experts = torch.repeat_interleave(reference.expert_sizes(c.expert_offsets))
    return torch.zeros_like(c.gates).index_add_(1, experts, terms)


@types_in_their_loops
def test_passes_over_tokens_and_neurons(dtype, arch):
    """A small workspace: sums over several passes stay fp32 until the last one. In bfloat16 nearly
    every result is then the same number; had passes been rounded, half of them would not be.
    dgates, which is fp32, sums at most five parts of 32 neurons in another order: (5 - 1) eps."""
    case = random_case(8, 300, 16, [136, 40], dtype=dtype, exact_ste=True)
    passes = Ops(arch=arch, multiprocessors=1, **SMALL_WORKSPACE)
    want, got = gradients(case, Ops(arch=arch)), check(case, passes)
    if hasattr(passes, "launches"):
        assert passes.workspace_bytes <= 0.375 * 2**20
        launches = [name for name, *_ in passes.launches]
        assert sum("neurons" in name for name in launches) >= 4
        assert sum("weights" in name for name in launches) >= (4 if arch == "90a" else 12)
    allowed = 4 * torch.finfo(torch.float32).eps * terms_of_dgates(case)
    assert ((got["dgates"] - want["dgates"]).abs() <= allowed).all()
    if dtype == torch.bfloat16:
        for name in got.keys() - {"dgates"}:
            assert (got[name] != want[name]).float().mean() < 0.02, name


@in_both_loops
@pytest.mark.parametrize("without", [("dx",), ("dgate_proj", "dup_proj", "ddown_proj_t")])
def test_passes_for_what_is_wanted(without, arch):
    case = random_case(9, 270, 16, [40, 72], dtype=torch.bfloat16)
    passes = Ops(arch=arch, multiprocessors=1, **SMALL_WORKSPACE)
    check(case, passes, without=without, save_activations=True)


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("with_grad_weight", [False, True])
def test_workspace_is_bounded(dtype, with_grad_weight):
    ops = Interpreter(multiprocessors=132)
    for experts, intermediate, hidden in SIZES:
        for tokens in (1, 8192, 2**20):
            sizes = (tokens, hidden, intermediate, experts, dtype)
            assert ops.backward_workspace(*sizes, with_grad_weight) <= 256 << 20
            assert ops.backward_workspace(tokens, 0, *sizes[2:], with_grad_weight) <= 256 << 20


@types_in_their_loops
def test_passes_over_fine_experts(dtype, arch):
    """Passes begin and end within experts and between them; the last are empty, because the host
    allows for more gaps than there are."""
    case = random_case(15, 70, 16, [16, 29, 0, 100, 3] + [16] * 30, dtype=dtype, exact_ste=True)
    passes = Ops(arch=arch, **SMALL_WORKSPACE)
    check(case, passes)
    if hasattr(passes, "launches"):
        assert passes.workspace_bytes <= 0.375 * 2**20
        launches = [name for name, *_ in passes.launches]
        assert sum("clip_experts" in name for name in launches) >= 3


@interpreter_only
@in_both_loops
@pytest.mark.parametrize("tokens", [8192, 20000])
@pytest.mark.parametrize("experts", [8, 517])
def test_passes_are_those_of_the_model_of_gpu_time(experts, tokens, arch):
    """Llama-2-7B's FFN; 20000 tokens go in several passes, through the neurons for dx and once more
    for the weight gradients. Only the sum of the sizes is known to either."""
    sizes = (11008 - experts + 1, *[1] * (experts - 1))
    per_pass, _, over_columns = cut(Load(4096, sizes, torch.ones(tokens, experts)))
    over_tokens = -(-tokens // per_pass)
    names = Interpreter(arch=arch).backward_launches(tokens, 4096, 11008, experts, torch.bfloat16)
    widths_of_tiles = {"80": 2, "90a": 3}[arch]
    sweeps = 2 if over_tokens > 1 else 1
    passes = over_tokens * over_columns
    assert sum("sum_dgates" in name for name in names) == passes
    assert sum("neurons" in name for name in names) == widths_of_tiles * passes * sweeps
