import os
import random
import sys
from pathlib import Path

import pytest
import torch

# The tests are for the installed package. `python -m pytest` puts the working directory first on
# the path, where the source folder of the same name would hide it.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@pytest.fixture
def seed() -> int:
    """A new seed every run, shown with a failure; DSMOE_SEED in the environment repeats it."""
    value = int(os.environ.get("DSMOE_SEED", random.SystemRandom().randrange(2**31)))
    print(f"DSMOE_SEED={value}")
    torch.manual_seed(value)
    return value
