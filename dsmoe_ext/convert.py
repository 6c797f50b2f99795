"""Dense <-> sparse: the same neurons of any model, cut into experts, and back again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify(
    model: "PreTrainedModel | str | Path",
    num_experts: int = 8,
    *,
    permutations: Sequence[Tensor] | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> "PreTrainedModel":
    """A sparse model of a dense one, of the same class, computing the same function at first.

    Args:
        model: a transformers model with gated MLPs, or the folder or hub id of one. Weights are
            shared with it, not copied, but for permuted MLPs. The dense model stays usable, but
            training one, or moving or casting it by `.to`, changes the other: deepcopy it where
            that matters. Of a vision-language model the language model becomes sparse.
        num_experts: routed experts of equal size; or expert_sizes among the options.
        permutations: per layer, the order of the neurons [I] (partition.py); None: the model's.
        dtype: of a model that is loaded from a folder; None: as stored.
        options: of the FFNs (see DSMoEFFN): expert_sizes, shared_size, threshold, method, gates,
            ste, ...; seed, sparsity_weight, target_active. With router_init="paper" the function is
            not the same.

    What is found in a model that does not fit (no gated MLP, biases, another activation, something
    else inside) stands in the error.
    """
    from dsmoe_ext.models.adopt import connect_parts, replace_mlps, text_model

    if isinstance(model, str | Path):
        model = load_dense(model, dtype)
    check_dense(model)
    refuse_offloaded(model)
    sparse = sharing_copy(model)
    _forget_gguf(sparse)
    part = text_model(sparse)
    replace_mlps(part, {"num_experts": num_experts, **options}, permutations)
    connect_parts(sparse, part.config)
    return sparse


def check_dense(model: "PreTrainedModel") -> None:
    """Raises, with what was found, unless the model can be made sparse."""
    from transformers import PreTrainedModel

    from dsmoe_ext.gated_mlp import Unsuitable, kind_of, probe
    from dsmoe_ext.layers import find_ffns
    from dsmoe_ext.models.adopt import gated_mlps, text_model, what_stands_there

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no transformers model")
    if find_ffns(model):
        raise TypeError("the model is already sparse; dsmoe_ext.merge gives the dense model back")
    mlps = gated_mlps(text_model(model))
    if not mlps:
        raise Unsuitable(
            f"{type(model).__name__} has no gated MLP (gate_proj, up_proj, down_proj) in its "
            f"layers, but {what_stands_there(model)}"
        )
    for mlp in mlps.values():
        probe(mlp, kind_of(mlp))


def merge(model: "PreTrainedModel") -> "PreTrainedModel":
    """The plain dense model of a sparse one, of the same class, neurons in the dense order.

    Undoes sparsify bit for bit. Routers and thresholds are left out: the result uses every neuron
    for every token. Everything but permuted FFNs is shared with model.
    """
    from transformers import PreTrainedModel

    from dsmoe_ext.ffn import DSMoEFFN
    from dsmoe_ext.layers import find_ffns
    from dsmoe_ext.models.adopt import disconnect

    if not isinstance(model, PreTrainedModel) or not find_ffns(model):
        raise TypeError(f"{type(model).__name__} has no sparse FFN, so there is nothing to merge")
    refuse_offloaded(model)
    dense = sharing_copy(model)
    for module in dense.modules():
        if isinstance(module, PreTrainedModel):
            disconnect(module)
    with torch.device("meta"):  # its MLPs are of the right class
        shell = type(dense)(copy.deepcopy(dense.config))
    for name, ffn in list(dense.named_modules()):
        if isinstance(ffn, DSMoEFFN):
            mlp = shell.get_submodule(name)
            for weight_name, weight in zip(ffn.names, ffn.dense_weights(), strict=True):
                getattr(mlp, weight_name).weight = weight
            dense.set_submodule(name, mlp.train(ffn.training))
    return dense


convert_llama, merge_to_llama = sparsify, merge  # names of version 0.1


def load_dense(path: str | Path, dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
    """The dense model of a folder or hub id; one clear sentence if it is none."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from dsmoe_ext.models import KEY

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
    if getattr(config.get_text_config(decoder=True), KEY, None) is not None:
        raise TypeError(f"{path} is already sparse; dsmoe_ext.merge gives the dense model back")
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, AutoModelForCausalLM)
    return cls.from_pretrained(path, dtype=dtype or "auto")


def refuse_offloaded(model: "PreTrainedModel") -> None:
    """Weights on disk, which come and go around every call, cannot be shared by two models."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()) and any(
        tensor.is_meta for tensor in (*model.parameters(), *model.buffers())
    ):
        raise RuntimeError("parts of the model are offloaded: load it whole, without device_map")


def check_finite(model: "PreTrainedModel") -> None:
    """Refuses weights that are NaN or infinite, of which nothing could be measured."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds numbers that are not finite: the model is damaged")


def sharing_copy(model: ModelT) -> ModelT:
    """The model once more, with modules and configs of its own around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _forget_gguf(model: "PreTrainedModel") -> None:
    """What loading GGUF leaves behind keeps a model from being saved."""
    found = getattr(model.config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    if str(getattr(found, "quant_method", method)).lower().endswith("gguf"):
        del model.config.quantization_config
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
