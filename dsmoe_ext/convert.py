"""Dense LLaMA <-> DSMoELlama: the same neurons, cut into experts, and back again."""

import copy
from pathlib import Path

import torch
from torch import nn

from dsmoe_ext.ffn import DSMoEFFN


def convert_llama(model, num_experts: int = 8, *, permutations=None, dtype=None, **options):
    """A DSMoELlamaForCausalLM from a dense LLaMA, computing the same function at first.

    Args:
        model: a transformers LlamaForCausalLM, or the folder or hub id of one. A model's weights
            are used, not copied, except down_proj, which is stored transposed. The dense model
            stays usable, but training one, or moving or casting it by `.to`, changes the other:
            deepcopy it where that matters.
        num_experts: routed experts of equal size; or expert_sizes among the options.
        permutations: per layer, the order of the neurons [I] (partition.py); None: LLaMA's.
        dtype: of a model that is loaded from a folder; None: as stored.
        options: the fields of DSMoELlamaConfig: expert_sizes, shared_size, threshold, method,
            gates, ste, ... With router_init="paper" the function is not the same.
    """
    from transformers import LlamaForCausalLM

    from dsmoe_ext.models.configuration import DSMoELlamaConfig
    from dsmoe_ext.models.modeling import DSMoELlamaForCausalLM

    if isinstance(model, str | Path):
        model = load_llama(model, dtype)
    if isinstance(model, DSMoELlamaForCausalLM):
        raise TypeError("the model is already converted; merge_to_llama gives the dense model back")
    if not isinstance(model, LlamaForCausalLM):
        raise TypeError(
            f"{type(model).__name__} is no LlamaForCausalLM, and only those can be converted"
        )
    if unknown := sorted(set(options) - DSMoELlamaConfig.own_fields()):
        fields = ", ".join(sorted(DSMoELlamaConfig.own_fields()))
        raise TypeError(f"convert_llama has no option {unknown[0]!r}; it has {fields}")
    dense = model
    config = DSMoELlamaConfig(**_config_fields(dense.config), num_experts=num_experts, **options)
    num_layers = config.num_hidden_layers
    if permutations is not None and len(permutations) != num_layers:
        raise ValueError(f"permutations has {len(permutations)} entries for {num_layers} layers")

    with torch.device("meta"):
        sparse = DSMoELlamaForCausalLM(config)
    _share(dense, sparse)
    for index, (old, new) in enumerate(zip(dense.model.layers, sparse.model.layers, strict=True)):
        order = None if permutations is None else permutations[index]
        new.mlp = DSMoEFFN.from_llama_mlp(
            old.mlp, permutation=order, seed=0, **_from_mlp_options(config)
        )
        new.mlp.set_seed(config.seed, index)
    return sparse


def merge_to_llama(model):
    """The plain LlamaForCausalLM of a DSMoELlamaForCausalLM, neurons in LLaMA's order.

    Undoes convert_llama bit for bit. Routers and thresholds are left out: the result uses every
    neuron for every token. Everything but the FFNs is shared with model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from dsmoe_ext.models.modeling import DSMoELlamaForCausalLM

    if not isinstance(model, DSMoELlamaForCausalLM):
        raise TypeError(
            f"{type(model).__name__} is no DSMoELlamaForCausalLM, so there is nothing to merge"
        )
    fields = _config_fields(model.config)
    own = model.config.own_fields()
    config = LlamaConfig(**{name: value for name, value in fields.items() if name not in own})
    with torch.device("meta"):
        dense = LlamaForCausalLM(config)
    _share(model, dense)
    for old, new in zip(model.model.layers, dense.model.layers, strict=True):
        new.mlp = old.mlp.to_llama_mlp(config)
    return dense


def load_llama(path, dtype=None):
    """The dense LlamaForCausalLM of a folder or hub id; one clear sentence if it is none."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = Path(path)
    looks_like_a_path = folder.is_absolute() or str(path).startswith(".") or folder.exists()
    if looks_like_a_path and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json" if folder.exists() else f"no folder {path}"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"{path} is neither a folder nor a reachable hub id") from error
    if config.model_type != "llama":
        raise ValueError(
            f"{path} holds a {config.model_type} model, but only llama can be converted"
        )
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype or "auto")


def _config_fields(config) -> dict:
    """What another LLaMA config takes over: not the class, nor how it was stored (GGUF)."""
    dropped = ("model_type", "architectures", "transformers_version", "quantization_config")
    fields = {name: value for name, value in config.to_dict().items() if name not in dropped}
    fields["attn_implementation"] = config._attn_implementation
    return fields


def _from_mlp_options(config) -> dict:
    given = ("hidden_size", "intermediate_size")  # by the MLP
    return {name: v for name, v in config.ffn_options().items() if name not in given}


def _share(old: nn.Module, new: nn.Module) -> None:
    """Gives new, built on the meta device, all parameters and buffers of old but those of MLPs."""
    tensors = dict(old.named_parameters(remove_duplicate=False))  # tied ones under both names
    tensors |= old.named_buffers(remove_duplicate=False)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if ".mlp." not in name:
            setattr(new.get_submodule(module), leaf, tensor)
    new.generation_config = copy.deepcopy(old.generation_config)
    new.train(old.training)
