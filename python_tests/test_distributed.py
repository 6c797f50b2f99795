"""Expert parallelism between processes (Gloo); distributed/ranks.py has the checks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "distributed" / "ranks.py"


def run(folder, *checks: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RANKS, folder, *checks],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world, tmp_path):
    """Values, gradients, bits, and training under DDP and FSDP2, as in one process."""
    checks = [f"{check}:{world}" for check in ("ffn", "gather", "bits", "training")]
    result = run(tmp_path, *checks)
    assert result.returncode == 0, result.stdout + result.stderr


def test_checkpoint_of_another_number_of_ranks(tmp_path):
    result = run(tmp_path, "save:4", "load:2", "load:1", "load:4")
    assert result.returncode == 0, result.stdout + result.stderr


def test_converted_model(tmp_path):
    """A sparse model over two ranks as in one process; its checkpoint on three and one."""
    result = run(tmp_path, "model:2", "model_load:3", "model_load:1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_killed_rank_ends_the_job(seed, tmp_path):
    result = run(tmp_path, "kill:3", DSMOE_SEED=str(seed))
    report = result.stdout + result.stderr
    assert time.time() - float((tmp_path / "death").read_text()) < 60, report
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "has lost another rank" in line]
    assert len(lines) == 2 and all("restart from the last checkpoint" in line for line in lines)
    assert "Traceback" not in report
