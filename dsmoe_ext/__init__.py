"""Dense LLaMA models made sparse: kernels, routing, conversion, calibration and training.

import dsmoe_ext
model = dsmoe_ext.convert_llama("path/to/llama", num_experts=8)
"""

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(
        f"dsmoe_ext needs torch 2.10 or newer, but torch is {torch.__version__}: "
        "run `pip install torch==2.13.0`."
    )

if importlib.util.find_spec("dsmoe_ext._C") is None:
    raise ImportError(
        f"{Path(__file__).parent} is the source folder of dsmoe_ext and holds no compiled part: "
        "run `pip install .` beside it, then start Python in another directory."
    )

from dsmoe_ext.models.auto import install as _install_auto_classes
from dsmoe_ext.ops import PackedWeights, build_info, pack_weights, permute, route, sparse_ffn

__version__ = version("dsmoe_ext")

_install_auto_classes()

# Loaded at first use, so that the ops alone need no transformers and import quickly.
_LAZY = {
    "calibrate": "calibration",
    "DSMoEFFN": "ffn",
    "set_threshold": "ffn",
    "active_fraction": "statistics",
    "LambdaController": "losses",
    "ThresholdController": "losses",
    "balance_loss": "losses",
    "sparsity_loss": "losses",
    "convert_llama": "convert",
    "merge_to_llama": "convert",
    "DSMoELlamaConfig": "models",
    "DSMoELlamaForCausalLM": "models",
    "DSMoELlamaModel": "models",
}

__all__ = ["PackedWeights", "build_info", "pack_weights", "permute", "route", "sparse_ffn", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"dsmoe_ext.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'dsmoe_ext' has no attribute {name!r}")
