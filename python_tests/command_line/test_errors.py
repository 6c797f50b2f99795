"""Every expected error: broken models, wrong sizes, outputs that cannot be, a disk that is full."""

import errno
import json
import os

import pytest
import torch
from cli import dsmoe, fails, run

from dsmoe_ext.training.tiny import save_tiny_llama, tiny_llama


@pytest.fixture
def broken(tmp_path):
    """Folders that are wrong in one way each."""
    save_tiny_llama(tmp_path / "good")
    for name in ("notjson", "gpt", "cut", "noweights", "lacking", "notokenizer", "other"):
        save_tiny_llama(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notjson" / "config.json").write_text("{")
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    other = config | {"intermediate_size": 48}
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "noweights" / "model.safetensors").unlink()
    model = tiny_llama(num_hidden_layers=1)
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "lacking")
    (tmp_path / "notokenizer" / "tokenizer.json").unlink()
    (tmp_path / "notokenizer" / "tokenizer_config.json").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("absent", "no such"),
        ("empty", "no config.json"),
        ("notjson", "not JSON"),
        ("gpt", "lacks"),
        ("cut", "damaged"),
        ("noweights", "no weights"),
        ("lacking", "lacks"),
        ("other", "shape"),
        ("notokenizer", "no tokenizer"),
    ],
)
def test_broken_models(broken, folder, message):
    if folder != "notokenizer":
        assert message in fails("convert", broken / folder, broken / "out")
        assert not (broken / "out").exists()
    assert message in fails("eval", broken / folder)
    assert not [path for path in broken.iterdir() if path.name.startswith(".")]


def test_wrong_kinds_and_sizes(shared, tmp_path):
    out = tmp_path / "out"
    assert "divide" in fails("convert", shared / "dense", out, "--experts", 7)
    assert "sum" in fails("convert", shared / "dense", out, "--expert-sizes", "8,16")
    assert "already converted" in fails("convert", shared / "sparse", out)
    assert "a dense model" in fails("merge", shared / "dense", out)
    assert "dense" in fails("eval", shared / "dense", "--thresholds", "0.5")
    assert "no such file" in fails("eval", shared / "dense", "--data", tmp_path / "none.txt")
    if not torch.cuda.is_available():
        assert "no CUDA" in fails("eval", shared / "dense", "--device", "cuda")
    assert "--device must be" in fails("eval", shared / "dense", "--device", "mps")
    options = ("--steps", 1, "--target-active", 0.5)
    assert "is dense" in fails("train", shared / "dense", out, *options)
    assert "windows" in fails("eval", shared / "dense", "--window", 300_000)
    (tmp_path / "void.txt").write_text(" ")
    assert "is empty" in fails("eval", shared / "dense", "--data", tmp_path / "void.txt")
    assert not out.exists()


def test_outputs_that_cannot_be(shared, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("precious")
    assert "not empty" in fails("convert", shared / "dense", taken)
    assert (taken / "mine").read_text() == "precious"
    assert "is a file" in fails("convert", shared / "dense", taken / "mine")
    assert "not a directory" in fails("convert", shared / "dense", taken / "mine" / "below")
    run("convert", shared / "dense", taken / "model", "--experts", 4)
    for command in ("convert", "calibrate", "merge", "train"):
        assert "which is read" in fails(command, taken / "model", taken, "--overwrite")
    assert (taken / "model" / "config.json").exists()
    run("convert", shared / "dense", taken, "--experts", 4, "--overwrite")
    assert (taken / "mine").read_text() == "precious" and (taken / "config.json").exists()
    assert (taken / "model" / "config.json").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    assert "no space left" in fails("convert", shared / "dense", tmp_path / "new")


class _Usage:
    free = 1000


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "permission denied: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
    ],
)
def test_trouble_while_saving_leaves_nothing(shared, tmp_path, monkeypatch, error, code, message):
    from transformers import LlamaForCausalLM

    def save(self, folder, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    result = dsmoe("convert", shared / "dense", tmp_path / "out")
    assert result.exit_code == code and message in result.stderr
    assert "Traceback" not in result.output and list(tmp_path.iterdir()) == []


def test_mistakes_of_ours_say_so(shared, tmp_path, monkeypatch):
    def sparsify(*arguments, **options):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("dsmoe_ext.convert.sparsify", sparsify)
    result = dsmoe("convert", shared / "dense", tmp_path / "out")
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: oops" in result.stderr
    assert "python -m dsmoe_ext" in result.stderr and "Traceback" not in result.stderr
