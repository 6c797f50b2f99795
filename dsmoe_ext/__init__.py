"""Dense language models made sparse: kernels, routing, conversion, calibration and training.

import dsmoe_ext
model = dsmoe_ext.sparsify("path/to/model", num_experts=8)
"""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("dsmoe_ext._C") is None:
    raise ImportError(
        f"{Path(__file__).parent} is the source folder of dsmoe_ext and holds no compiled part: "
        "run `pip install .` beside it, then start Python in another directory."
    )

from dsmoe_ext.models.install import install as _install_in_transformers

__version__ = version("dsmoe_ext")

_install_in_transformers()

# `dsmoe --help` shall not wait two seconds for torch: under that command the ops are lazy, too.
if TYPE_CHECKING or Path(sys.argv[0] if sys.argv else "").name != "dsmoe":
    import dsmoe_ext.torch_version  # noqa: F401 # isort: skip
    from dsmoe_ext.ops import PackedWeights, build_info, pack_weights, permute, route, sparse_ffn

__all__ = ["PackedWeights", "build_info", "pack_weights", "permute", "route", "sparse_ffn"]

# Loaded at first use, so that the ops alone need no transformers and import quickly.
_LAZY = {
    **dict.fromkeys(__all__, "ops"),
    "calibrate": "calibration",
    "DSMoEFFN": "ffn",
    "pack": "layers",
    "set_threshold": "layers",
    "shard_routers": "layers",
    "active_fraction": "layers",
    "LambdaController": "losses",
    "ThresholdController": "losses",
    "balance_loss": "balance",
    "sparsity_loss": "losses",
    "add_sparsity_loss": "sparsity",
    "SparseTrainer": "training.trainer",
    "sparsify": "convert",
    "merge": "convert",
    "convert_llama": "convert",
    "merge_to_llama": "convert",
    "DSMoELlamaConfig": "models.legacy",
    "DSMoELlamaForCausalLM": "models.legacy",
    "DSMoELlamaModel": "models.legacy",
}

__all__ += [name for name in _LAZY if name not in __all__]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"dsmoe_ext.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'dsmoe_ext' has no attribute {name!r}")
