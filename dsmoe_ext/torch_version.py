"""Refuses a torch that is too old, in one sentence, before more of it is touched."""

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(
        f"dsmoe_ext needs torch 2.10 or newer, but torch is {torch.__version__}: "
        "run `pip install torch==2.13.0`."
    )
