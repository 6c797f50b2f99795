import sys
from pathlib import Path

import pytest

from dsmoe_ext.training.data import builtin_text
from dsmoe_ext.training.tiny import save_tiny_llama

sys.path.insert(0, str(Path(__file__).parent.resolve()))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder with a dense model, a text and a converted model, for tests that only read."""
    from cli import run

    folder = tmp_path_factory.mktemp("shared")
    save_tiny_llama(folder / "dense")
    (folder / "text.txt").write_text(builtin_text()[:12000])
    run("convert", folder / "dense", folder / "sparse", "--experts", 4)
    return folder
