"""Sparse FFNs put into a model, and what the model then needs to know about them."""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dsmoe_ext.ffn import DSMoEFFN
from dsmoe_ext.gated_mlp import Unsuitable, describe, kind_of
from dsmoe_ext.layers import find_ffns, pack
from dsmoe_ext.lm_loss import causal_lm_loss
from dsmoe_ext.models import KEY
from dsmoe_ext.models.options import FFN_DEFAULTS, complete
from dsmoe_ext.routers import LinearRouter, Router
from dsmoe_ext.sparsity import LossWithSparsity, unwatch, watch
from dsmoe_ext.weights import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The FFN of a layer in a stack of layers. Not "mlp.experts.3" nor "mlp.shared_expert": what is an
# expert already stays as it is.
_IN_A_LAYER = re.compile(r"(^|\.)\d+\.\w+$")


def gated_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """The gated MLPs of the model's layers by name; Unsuitable if one is not quite one."""
    return {
        name: module
        for name, module in model.named_modules()
        if _IN_A_LAYER.search(name) and not isinstance(module, DSMoEFFN) and describe(module)
    }


def what_stands_there(model: nn.Module) -> str:
    """The other modules of the layers in words, for an error: "ArceeMLP (up_proj, down_proj)"."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        children = [child for child, _ in module.named_children()]
        if _IN_A_LAYER.search(name) and children and "attn" not in name and "attention" not in name:
            found.setdefault(type(module).__name__, children)
    words = ", ".join(f"{kind} ({', '.join(names)})" for kind, names in found.items())
    hint = '; experts_implementation="dsmoe" runs a mixture of experts as it is (docs/experts.md)'
    has_experts = any("experts" in names for names in found.values())
    return (words or "none with layers inside") + hint * has_experts


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part with the layers to make sparse: of a vision-language model its language model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, PreTrainedModel) and gated_mlps(decoder) else model


def replace_mlps(
    model: PreTrainedModel, options: dict[str, Any], permutations: Sequence[Tensor] | None = None
) -> int:
    """Puts DSMoEFFNs in place of the gated MLPs; the options become the config's key."""
    mlps = gated_mlps(model)
    if not mlps:
        return 0
    if permutations is not None and len(permutations) != len(mlps):
        raise ValueError(f"permutations has {len(permutations)} entries for {len(mlps)} layers")
    sizes = {kind_of(mlp).intermediate_size for mlp in mlps.values()}
    for size in sizes:
        options = complete(options, size)
    if len(sizes) > 1 and options["expert_sizes"] is not None:
        raise Unsuitable(f"expert_sizes cannot suit layers of different sizes {sorted(sizes)}")
    for index, (name, mlp) in enumerate(mlps.items()):
        given = {option: options[option] for option in FFN_DEFAULTS}
        if permutations is not None:
            given["permutation"] = permutations[index]
        ffn = DSMoEFFN.from_mlp(mlp, seed=0, **given)
        ffn.set_seed(options["seed"], index)
        if options["quantization"]:
            ffn.quantize(**options["quantization"])
        elif options["compression"]:
            cut = (ffn.shared_size, ffn.sizes[-1], ffn.num_experts)
            ffn.use_factors(cut, **options["compression"])
        rule = getattr(ffn.router, "rule_options", {})
        options |= {name: rule[name] for name in ("rescale", "gate_scale") if name in rule}
        model.set_submodule(name, ffn)
    _join_routers(model)
    setattr(model.config, KEY, options)
    return len(mlps)


def _join_routers(model: nn.Module) -> None:
    """Routers that share a part over the layers learn of each other."""
    routers = [m.router for m in model.modules() if isinstance(m, DSMoEFFN)]
    for layer, router in enumerate(routers):
        router.join(layer, routers[0])


def _router_classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, Router)}


def adopt(model: PreTrainedModel, config: "PretrainedConfig") -> None:
    """Called as model, or a model around it, is built. config is the one with the key."""
    if model.config is config:
        replace_mlps(model, getattr(config, KEY))
    if find_ffns(model):
        connect(model, config)


def connect(model: PreTrainedModel, config: "PretrainedConfig") -> None:
    """Makes a model that holds sparse FFNs, itself or in a part of it, work with them."""
    watch(model, config)
    model.config.__dict__.pop("auto_map", None)  # of the folder; saving writes it anew
    text_config = model.config.get_text_config(decoder=True)
    setattr(text_config, KEY, getattr(config, KEY))  # one dict, also where configs were copied
    has_loss = getattr(model, "loss_type", None) is not None  # not so of a base model
    loss: Any = model.loss_function if has_loss else None
    if has_loss and not isinstance(loss, LossWithSparsity):
        name = getattr(loss, "__name__", "")
        model.loss_function = LossWithSparsity(
            causal_lm_loss if name == "ForCausalLMLoss" else loss
        )
    model._init_weights = functools.partial(_init_weights, model)
    model.pack = functools.partial(pack, model)
    # The offsets of folders saved before they were derived.
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {r"\.expert_offsets$"}
    # accelerate then gives routers an FSDP2 group of their own: their dtype is another.
    model._no_split_modules = {*(model._no_split_modules or ()), *_router_classes(model)}
    for part in {id(c): c for c in (model.config, config, text_config)}.values():
        _strip_tp_plan(part)
    if isinstance(getattr(model, "_tp_plan", None), dict):
        model._tp_plan = _without_mlps(model._tp_plan)


def connect_parts(model: nn.Module, config: "PretrainedConfig") -> None:
    """Connects the model and every model inside it that holds sparse FFNs."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and find_ffns(module):
            connect(module, config)


def disconnect(model: PreTrainedModel) -> None:
    """Undoes connect, and drops the key."""
    unwatch(model)
    loss = model.__dict__.pop("_loss_function", None)
    if isinstance(loss, LossWithSparsity) and loss.original is not causal_lm_loss:
        model.loss_function = loss.original
    for name in ("_init_weights", "pack"):
        model.__dict__.pop(name, None)
    for name in ("_keys_to_ignore_on_load_unexpected", "_no_split_modules"):
        kept = set(getattr(model, name)) - {r"\.expert_offsets$", *_router_classes(model)}
        setattr(model, name, kept)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.__dict__.pop(KEY, None)
        config.__dict__.pop("base_model_tp_plan", None)


def _strip_tp_plan(config: "PretrainedConfig") -> None:
    """Tensor parallelism covers attention only: experts are not split over devices."""
    if plan := getattr(config, "base_model_tp_plan", None):
        config.base_model_tp_plan = _without_mlps(plan)


def _without_mlps(plan: dict[str, Any]) -> dict[str, Any]:
    return {
        name: way for name, way in plan.items() if not re.search(r"\.(mlp|feed_forward)\.", name)
    }


def _init_weights(model: PreTrainedModel, module: nn.Module) -> None:
    """The model's own rule, for its linear layers in the FFNs too, and ours for the rest.

    Runs under transformers' guard, which leaves tensors alone that a checkpoint has filled; buffers
    are asked one by one, as some of a module may lie on the meta device (offloaded) unmarked.
    """
    if isinstance(module, Weight):
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = module.weight
        module = linear
    elif isinstance(module, LinearRouter | nn.GRUCell):
        return module.reset_parameters()
    elif isinstance(module, DSMoEFFN | Router):
        return module.reset_buffers(
            lambda tensor: tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)
        )
    type(model)._init_weights(model, module)
