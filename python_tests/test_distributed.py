"""Expert parallelism between processes (Gloo); distributed/ranks.py has the checks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "distributed" / "ranks.py"


def run(check: str, world: int, folder, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RANKS, check, str(world), folder],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", ["ffn", "gather", "bits", "training"])
def test_ranks(check, world, tmp_path):
    result = run(check, world, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_checkpoint_of_another_number_of_ranks(tmp_path):
    for check, world in (("save", 4), ("load", 2), ("load", 1), ("load", 4)):
        result = run(check, world, tmp_path)
        assert result.returncode == 0, f"{check} {world}: {result.stdout}{result.stderr}"


def test_a_killed_rank_ends_the_job(seed, tmp_path):
    start = time.monotonic()
    result = run("kill", 3, tmp_path, DSMOE_SEED=str(seed))
    seconds = time.monotonic() - start
    report = result.stdout + result.stderr
    assert result.returncode != 0 and seconds < 60, report
    lines = [line for line in result.stderr.splitlines() if "has lost another rank" in line]
    assert len(lines) == 2 and all("restart from the last checkpoint" in line for line in lines)
    assert "Traceback" not in report
