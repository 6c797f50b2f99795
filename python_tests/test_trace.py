"""DSMOE_TRACE: a user's calls, written down and made again."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dsmoe_ext import ops
from dsmoe_ext.benchmarks.replay import read_trace, replay
from dsmoe_ext.errors import UserError
from dsmoe_ext.trace import Trace, rebuilt

pytestmark = pytest.mark.quick


def run_ops(requires_grad=True):
    x = torch.randn(5, 16).requires_grad_(requires_grad)
    gate, up, down = (torch.randn(24, 16) for _ in range(3))
    offsets = torch.tensor([0, 8, 24], dtype=torch.int32)
    gates = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    y = ops.sparse_ffn(x, gates, gate, up, down, offsets)
    if requires_grad:
        y.sum().backward()
    with torch.no_grad():
        ops.sparse_ffn(x, gates, ops.pack_weights(gate, up, down, offsets))
    return y


def test_calls_are_written_and_made_again(tmp_path):
    with Trace(tmp_path / "calls.jsonl"):
        run_ops()
        run_ops()
    calls = read_trace(tmp_path / "calls.jsonl")
    assert {(call.op, call.count) for call in calls} == {
        ("expert_mlp", 2),
        ("expert_mlp_backward", 2),
        ("expert_mlp_packed", 2),
        ("pack_weights", 2),
    }
    forward = next(call for call in calls if call.op == "expert_mlp")
    assert forward.num_tokens == 5 and forward.active == 0.5
    assert forward.arguments["gates"]["tokens_per_expert"] == [3, 2]
    assert forward.arguments["expert_offsets"]["values"] == [0, 8, 24]
    assert all(replay(call, budget=0.0).best > 0 for call in calls)


def test_numbers_of_the_user_stay_with_the_user(tmp_path):
    with Trace(tmp_path / "calls.jsonl"):
        run_ops(requires_grad=False)
    rows = map(json.loads, (tmp_path / "calls.jsonl").read_text().splitlines())
    described = [pair for row in rows for pair in row["arguments"].items()]
    with_values = {
        name for name, entry in described if isinstance(entry, dict) and "values" in entry
    }
    assert with_values == {"expert_offsets"}


def test_rebuilt_gates_have_the_recorded_counts(seed):
    counts = [0, 7, 3]
    entry = {"shape": [7, 3], "strides": [3, 1], "dtype": "float32", "tokens_per_expert": counts}
    gates = rebuilt("gates", entry, torch.Generator().manual_seed(seed))
    assert (gates != 0).sum(0).tolist() == counts


def test_the_variable_traces_a_process(tmp_path):
    code = (
        "import torch, dsmoe_ext\n"
        "dsmoe_ext.route(torch.zeros(3, 2), 0.5, torch.tensor([0, 4, 8], dtype=torch.int32))\n"
    )
    environment = {**os.environ, "DSMOE_TRACE": str(tmp_path / "calls.jsonl")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert [call.op for call in read_trace(tmp_path / "calls.jsonl")] == ["route"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other").write_text("hello")
    with pytest.raises(UserError, match="is no trace that DSMOE_TRACE wrote"):
        read_trace(tmp_path / "other")
