"""Commands as processes: killed and resumed, terminated, diagnosed."""

import os
import signal
import subprocess
import sys
import time

import torch
from cli import MAIN, fails
from safetensors.torch import load_file

from dsmoe_ext.training.callbacks import read_log


def test_kill_and_resume_gives_the_same_bits(shared, tmp_path):
    """kill -9 in the middle, then --resume: the losses and the weights of an unbroken run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = ["--data", shared / "text.txt", "--window", "64", "--steps", "60", "--lr", "1e-3"]
    options += ["--target-active", "0.8", "--checkpoint-every", "4", "--batch-size", "2"]

    def train(out, *more):
        arguments = [str(part) for part in (shared / "sparse", out, *options, *more)]
        return subprocess.Popen(
            [*MAIN, "train", *arguments],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def finish(process):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    out = tmp_path / "killed"
    process = train(out)
    while len(read_log(out / "train.jsonl")) < 7:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "config.json").exists()
    assert "unfinished" in fails("eval", out)
    assert "--resume" in fails("train", shared / "sparse", out, *options)
    finish(train(out, "--resume"))
    finish(train(tmp_path / "straight"))

    def losses(folder):
        keys = ("step", "loss", "sparsity_loss", "grad_norm", "active_per_layer", "thresholds")
        return [[row[key] for key in keys] for row in read_log(folder / "train.jsonl")]

    assert losses(out) == losses(tmp_path / "straight")
    assert len(losses(out)) == 60
    pair = [load_file(f / "model.safetensors") for f in (out, tmp_path / "straight")]
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[1])


def test_terminated_from_outside(shared, tmp_path):
    out = tmp_path / "run"
    arguments = [shared / "sparse", out, "--steps", "100000", "--window", "32"]
    process = subprocess.Popen(
        [*MAIN, "train", *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(read_log(out / "train.jsonl")) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not list(tmp_path.glob(".*"))
    assert "interrupted" in errors and "Traceback" not in errors


def test_diagnosis(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dsmoe_ext"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for word in ("dsmoe_ext", "python", "torch", "transformers", "self-test     ok"):
        assert word in result.stdout
