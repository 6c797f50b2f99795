"""These tests compile kernels with nvcc and run them in the PTX interpreter, or on a GPU where
there is one:

    pytest python_tests/cuda
    pytest -n 2 --dist worksteal python_tests/cuda          half the time; 14 GB of memory

A run that does not name this folder (plain `pytest python_tests`) leaves them out: they need nvcc,
which they install from PyPI if it is missing.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent.resolve()
sys.path.insert(0, str(HERE))


def pytest_ignore_collect(collection_path, config):
    paths = (pathlib.Path(config.invocation_params.dir, a.split("::")[0]) for a in config.args)
    named = any(p.resolve() == HERE or HERE in p.resolve().parents for p in paths)
    return None if named else True


def pytest_collection_modifyitems(items):
    """The decisive cases first, and last the mutants, which start from their recordings."""
    order = {"test_decisive_case": 0, "test_mutants_are_killed": 2}
    items.sort(key=lambda item: order.get(item.originalname, 1))
