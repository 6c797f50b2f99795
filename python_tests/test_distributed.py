"""Expert parallelism between processes (Gloo); distributed/ranks.py has the checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "distributed" / "ranks.py"


def run(folder, *checks: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RANKS, folder, *checks],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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


def test_a_killed_rank_ends_the_job(seed):
    """And leaves a whole checkpoint: distributed/kills.py says what is looked at."""
    result = subprocess.run(
        [sys.executable, RANKS.with_name("kills.py"), "--times", "1", "--seed", str(seed)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
