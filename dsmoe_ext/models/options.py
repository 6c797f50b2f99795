"""The key "dsmoe" of a model's config: how its FFNs are cut and routed, the same for all layers."""

from typing import Any

from torch import nn

from dsmoe_ext.layout import expert_layout
from dsmoe_ext.models import KEY
from dsmoe_ext.routers import default_balance

# Of each layer's FFN; see DSMoEFFN. rescale and gate_scale None: what the method and the dense
# start need, noted once made, so that they stay as they are when thresholds move.
FFN_DEFAULTS: dict[str, Any] = {
    "num_experts": 8,
    "expert_sizes": None,
    "shared_size": 0,
    "threshold": 0.5,  # where tau starts; each layer's own is in the weights
    "method": "threshold",
    "top_k": 2,
    "gates": "scores",
    "rescale": None,
    "gate_scale": None,
    "router": "linear",
    "router_bias": None,
    "router_options": None,
    "balance": None,
    "router_init": "dense",
    "ste": "active",
    "sample_prob": 0.25,
}
# Of the model: what its experts are quantized to, {"bits": .., "group_size": .., "symmetric": ..};
# compressed to, {"rank": ..};
# seed of the sampled STE; lambda, by which training adds the sparsity loss; the share of the FFN
# that training should hold (ThresholdController).
DEFAULTS = FFN_DEFAULTS | {
    "quantization": None,
    "compression": None,
    "seed": 0,
    "sparsity_weight": 1.0,
    "target_active": None,
}


# What a balance loss counts if the user does not say: the papers' alphas, and where ReMoE starts.
BALANCE_WEIGHTS = {"switch": 0.01, "cv": 0.01, "load_l1": 1e-8}


def complete(given: dict[str, Any], intermediate_size: int) -> dict[str, Any]:
    """The options with all defaults; an error for a name that does not exist."""
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    form = options["balance"] or default_balance(options["method"])
    if "sparsity_weight" not in given and form:
        options["sparsity_weight"] = BALANCE_WEIGHTS.get(form, 1.0)
    sizes = expert_layout(
        intermediate_size, options["num_experts"], options["expert_sizes"], options["shared_size"]
    )
    routed = sizes[1:] if options["shared_size"] else sizes
    options["num_experts"] = len(routed)
    if options["expert_sizes"] is not None:
        options["expert_sizes"] = routed
    return options


def options_of(model: nn.Module) -> dict[str, Any]:
    """The options of a sparse model, however wrapped (DDP, PEFT, compiled), to read and to change;
    they are saved with the model."""
    for module in model.modules():
        options = getattr(getattr(module, "config", None), KEY, None)
        if isinstance(options, dict):
            return options
    raise ValueError(
        f"{type(model).__name__} has no config with the key {KEY!r}: make it sparse first "
        "(dsmoe_ext.sparsify)"
    )
