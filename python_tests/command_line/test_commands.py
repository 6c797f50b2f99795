"""Every command on a tiny random LLaMA."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from cli import dsmoe, fails, run
from safetensors.torch import load_file

from dsmoe_ext.training.callbacks import read_log

COMMANDS = (
    "report",
    "convert",
    "calibrate",
    "merge",
    "quantize",
    "eval",
    "generate",
    "train",
    "place",
    "prune",
    "demo",
)


@pytest.mark.quick
def test_help_and_version():
    text = run("--help")
    for command in COMMANDS:
        assert command in text
        own = run(command, "--help")
        assert "Example" in own and f"dsmoe {command}" in own
    assert run("--version").startswith("dsmoe ")


@pytest.mark.quick
def test_help_waits_for_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['dsmoe', '--help']; import dsmoe_ext.command_line.app; "
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys(); "
        "import dsmoe_ext; dsmoe_ext.sparse_ffn"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["convert"],
        ["convert", "a", "b", "--experts", "x"],
        ["convert", "a", "b", "--experts", "0"],
        ["convert", "a", "b", "--expert-sizes", "3,x"],
        ["calibrate", "a", "b", "--target-active", "1.5"],
        ["eval", "a", "--thresholds", "low"],
        ["train", "a", "b", "--precision", "fp16"],
        ["eval", "a", "--dtype", "int8"],
    ],
)
def test_wrong_usage_is_2(arguments):
    result = dsmoe(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


# ----------------------------------------------------------------------------------- the good paths


def test_convert_eval_and_merge_are_exact(shared, tmp_path):
    rows = {}
    for name in ("dense", "sparse"):
        options = ("--data", shared / "text.txt", "--window", 32, "--json")
        rows[name] = json.loads(run("eval", shared / name, *options))[0]
    assert rows["sparse"]["perplexity"] == pytest.approx(rows["dense"]["perplexity"], rel=1e-5)
    assert rows["sparse"]["active_ffn"] == rows["dense"]["active_ffn"] == 1.0
    run("merge", shared / "sparse", tmp_path / "merged")
    want = load_file(shared / "dense" / "model.safetensors")
    got = load_file(tmp_path / "merged" / "model.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert (tmp_path / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(shared, tmp_path, bits):
    text = ("--data", shared / "text.txt", "--window", 32)
    run("quantize", shared / "sparse", tmp_path / "codes", "--bits", bits, *text)
    rows = [
        json.loads(run("eval", folder, *text, "--json"))[0]
        for folder in (shared / "sparse", tmp_path / "codes")
    ]
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=0.05)
    assert rows[1]["parameters"] == rows[0]["parameters"]
    size = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (shared / "sparse", tmp_path / "codes")
    ]
    assert size[1] < size[0]
    assert "quantized already" in fails("quantize", tmp_path / "codes", tmp_path / "x", *text)
    assert "4 bits need groups" in fails(
        "quantize", shared / "sparse", tmp_path / "x", "--bits", 4, "--group-size", 0, "--plain"
    )
    assert not (tmp_path / "x").exists()


def test_eval_sweeps_thresholds(shared):
    options = ("--data", shared / "text.txt", "--window", 32, "--limit", 4)
    text = run("eval", shared / "sparse", *options, "--thresholds", "0.5,0.9", "--json")
    rows = json.loads(text)
    assert [row["threshold"] for row in rows] == [None, 0.5, 0.9]
    # All scores start at 0.75: between the thresholds, every expert switches off.
    assert [row["active_ffn"] for row in rows] == [1.0, 1.0, 0.0]
    assert rows[2]["active_parameters"] < rows[1]["active_parameters"] == 1.0
    table = run("eval", shared / "sparse", *options, "--thresholds", "0.9", "--per-layer")
    assert "as saved" in table and "0.9" in table and "layer" in table


def test_eval_of_several_texts_and_a_teacher(shared, tmp_path):
    (tmp_path / "wiki.raw").write_text("some words of a wiki \n" * 300)
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "other words " * 60}) + "\n")
    options = ("--data", shared / "text.txt", "--data", tmp_path / "other.jsonl", "--limit", 1)
    options += ("--wikitext", tmp_path / "wiki.raw", "--teacher", shared / "dense", "--window", 32)
    rows = json.loads(run("eval", shared / "sparse", *options, "--json"))
    assert [row["text"] for row in rows] == ["text.txt", "other.jsonl", "WikiText-2"]
    assert [row["window"] for row in rows] == [32, 32, 2048]
    for row in rows:  # a converted model computes what the dense one does, with all experts
        assert row["divergence"] == pytest.approx(0, abs=1e-5)
        assert row["experts_per_token"]["edges"][0] == 4
        assert sum(row["experts_per_token"]["shares"]) == pytest.approx(1)
    assert "KL" in run("eval", shared / "sparse", *options, "--per-layer")
    assert "own text" in fails("eval", shared / "dense", "--data", "self")


def test_no_text_at_all(shared, tmp_path):
    """The dense model's own text is enough to calibrate, and with a teacher to train."""
    options = ("--window", 32, "--tokens", 1024)
    run("calibrate", shared / "dense", tmp_path / "half", *options, "--expert-size", 8)
    assert "--teacher" in fails("train", tmp_path / "half", tmp_path / "no", "--data", "self")
    teacher = ("--teacher", shared / "dense", "--distill", 1)
    mixed = ("--data", "self", "--data", f"{shared / 'text.txt'}=2")
    run("train", tmp_path / "half", tmp_path / "out", *options, *teacher, *mixed, "--steps", 3)
    assert len(read_log(tmp_path / "out" / "train.jsonl")) == 3


def test_unequal_experts_and_a_shared_one(shared, tmp_path):
    options = ("--expert-sizes", "8,24,32", "--shared-size", 32)
    run("convert", shared / "dense", tmp_path / "out", *options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    options = config["dsmoe"]
    assert options["expert_sizes"] == [8, 24, 32] and options["shared_size"] == 32


def test_generate(shared):
    one, two = (dsmoe("generate", shared / name, "Hello", "-n", 8) for name in ("dense", "sparse"))
    assert one.exit_code == two.exit_code == 0
    assert one.stdout.startswith("Hello") and one.stdout == two.stdout
    assert "tokens/s" in two.stderr
    drawn = [
        run("generate", shared / "sparse", "Hello", "-n", 12, "--temperature", 1, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    options = ("--input", "x")
    assert dsmoe("generate", shared / "sparse", *options).exit_code == 2
    piped = dsmoe("generate", shared / "sparse", "-", "-n", 2, input="From a pipe")
    assert piped.stdout.startswith("From a pipe")
    assert "chat template" in fails("generate", shared / "sparse", "Hi", "--chat")
    assert "dense" in fails("generate", shared / "dense", "Hi", "--threshold", 0.4)


def test_calibrate(shared, tmp_path):
    pytest.importorskip("dsmoe_ext.calibration")
    options = ("--data", shared / "text.txt", "--window", 32, "--tokens", 1024)
    sparse = tmp_path / "half"
    run("calibrate", shared / "dense", sparse, *options, "--expert-size", 8, "--shared", 0.25)
    text = run("eval", sparse, "--data", shared / "text.txt", "--window", 32, "--json")
    assert json.loads(text)[0]["active_ffn"] == pytest.approx(0.5, abs=0.1)


def test_train_and_train_again(shared, tmp_path):
    out = tmp_path / "tuned"
    options = ("--data", shared / "text.txt", "--window", 32, "--steps", 6, "--lr", 1e-3)
    options = (*options, "--target-active", 0.9)
    run("train", shared / "sparse", out, *options)
    rows = read_log(out / "train.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"loss", "active", "thresholds", "grad_norm", "lr"} <= rows[0].keys()
    assert not list(out.glob("checkpoint-*"))
    assert (out / "tensorboard").is_dir() or not importlib.util.find_spec("tensorboard")
    run("eval", out, "--data", shared / "text.txt", "--window", 32, "--limit", 2)
    assert "not empty" in fails("train", shared / "sparse", out, *options)
    again = dsmoe("train", shared / "sparse", out, *options, "--resume")
    assert again.exit_code == 0 and "nothing to do" in again.stderr
    longer = (*options, "--steps", 9, "--resume")
    assert "finished run of 6 steps" in fails("train", shared / "sparse", out, *longer)
    other = (*options, "--window", 64, "--resume")
    assert "another window" in fails("train", shared / "sparse", out, *other)
    assert "which is read" in fails("train", out, out, *options, "--overwrite")
    missing = ("--data", "missing.txt", "--overwrite")
    assert "missing.txt" in fails("train", shared / "sparse", out, *missing)
    assert (out / "config.json").exists()
    more = ("--overwrite", "--teacher", shared / "dense", "--ste", "sampled")
    run("train", shared / "sparse", out, *options, *more, "--sparsity-weight", 0)
    assert json.loads((out / "config.json").read_text())["dsmoe"]["ste"] == "sampled"


def test_quiet_without_a_terminal(shared):
    options = ("--data", shared / "text.txt", "--window", 32, "--limit", 4)
    result = dsmoe("eval", shared / "sparse", *options)
    lines = result.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Loading", "Evaluating text.txt"]
    assert "\x1b" not in result.output and "\r" not in result.output
