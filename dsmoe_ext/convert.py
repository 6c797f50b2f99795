"""Dense LLaMA <-> DSMoELlama: the same neurons, cut into experts, and back again."""

import inspect
from pathlib import Path

import torch
from torch import nn

from dsmoe_ext.ffn import DSMoEFFN


def convert_llama(model, num_experts: int = 8, *, permutations=None, dtype=None, **options):
    """A DSMoELlamaForCausalLM from a dense LLaMA. With router_init="dense" (the default) it
    computes the same function.

    model: a transformers LlamaForCausalLM, or the folder (or hub id) of one. A model is converted
    in place of a copy:
        the result shares its weights, except down_proj, which is stored transposed. The dense model
        stays usable, but training one of the two then changes the other; deepcopy it first where
        that matters.
    num_experts, options: the fields of DSMoELlamaConfig (expert_sizes, shared_size, threshold,
    method, gates, ste, ...). permutations: per layer, the order of the neurons [I] (see
    partition.py); None keeps LLaMA's. dtype: of a model that is loaded from a folder.
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
    known = set(inspect.signature(DSMoELlamaConfig.__init__).parameters) - {"self", "kwargs"}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"convert_llama has no option {unknown[0]!r}; it has {', '.join(sorted(known))}"
        )
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
    config.gate_scale = sparse.model.layers[0].mlp.gate_scale
    return sparse


def merge_to_llama(model):
    """The plain LlamaForCausalLM with the weights of a DSMoELlamaForCausalLM, neurons in LLaMA's
    order.

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
    config = LlamaConfig(
        **{name: value for name, value in fields.items() if hasattr(LlamaConfig(), name)}
    )
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
    """The fields of a config that another LLaMA config takes over: not its class, nor how it was
    stored (GGUF)."""
    dropped = ("model_type", "architectures", "transformers_version", "quantization_config")
    fields = {name: value for name, value in config.to_dict().items() if name not in dropped}
    fields["attn_implementation"] = config._attn_implementation
    return fields


def _from_mlp_options(config) -> dict:
    return {
        n: v
        for n, v in config.ffn_options().items()
        if n not in ("hidden_size", "intermediate_size")
    }


def _share(old: nn.Module, new: nn.Module) -> None:
    """Gives new, built on the meta device, all parameters and buffers of old but those of MLPs."""
    tensors = dict(old.named_parameters(remove_duplicate=False))  # tied ones under both names
    tensors |= old.named_buffers(remove_duplicate=False)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if ".mlp." not in name:
            setattr(new.get_submodule(module), leaf, tensor)
    new.generation_config = old.generation_config
    new.train(old.training)
