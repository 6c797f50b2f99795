"""Run as `python kills.py [--times 20] [--seed 0]`: kills one rank of three at a random step of
training, in the middle of computing or of saving, and looks at what is left behind:

    the job has ended within a minute, and the ranks that live say why in one line each
    the newest checkpoint is whole: it loads on two ranks and training goes on from it
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANKS = Path(__file__).parent / "ranks.py"


def run(folder: str, *checks: str, seed: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, RANKS, folder, *checks],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DSMOE_SEED": str(seed)},
    )


def kill_once(seed: int) -> str:
    """One line about it; AssertionError with all output if something is not as it should be.
    test_distributed.py kills once."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(folder, "kill:3", seed=seed)
        report = result.stdout + result.stderr
        seconds = time.time() - float((Path(folder) / "death").read_text())
        assert seconds < 60, report
        assert result.returncode != 0 and "Traceback" not in report, report
        lines = [line for line in result.stderr.splitlines() if "has lost another rank" in line]
        assert len(lines) == 2, report
        assert all("restart from the last checkpoint" in line for line in lines), report
        loaded = run(folder, "after_kill:2", seed=seed)
        assert loaded.returncode == 0, report + loaded.stdout + loaded.stderr
        death = re.search(r"rank \d dies in \w+ after step \d+", report).group()
        step = re.search(r"goes on after step \d+", loaded.stdout).group()
    return f"seed {seed}: {death}; ended after {seconds:.1f} s; {step} on two ranks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.times):
        print(kill_once(seed), flush=True)


if __name__ == "__main__":
    main()
