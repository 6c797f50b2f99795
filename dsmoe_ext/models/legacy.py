"""Folders and names of versions 0.1, which had a LLaMA of their own, "dsmoe_llama".

Their tensors have the names of today; the fields lay flat in config.json. A folder opens as a
LlamaForCausalLM whose config has the key "dsmoe", and is saved as one.
"""

from typing import TYPE_CHECKING, Any

import transformers

from dsmoe_ext.models import KEY, OLD_MODEL_TYPE
from dsmoe_ext.models.options import DEFAULTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _moved(fields: dict[str, Any]) -> dict[str, Any]:
    """LlamaConfig's fields, with ours, which lay beside them, under the key."""
    fields = dict(fields)
    options = {name: fields.pop(name) for name in DEFAULTS if name in fields}
    if "num_experts_per_tok" in fields:
        options["top_k"] = fields.pop("num_experts_per_tok")
    return fields | {"model_type": "llama", "architectures": None, KEY: options}


class DSMoELlamaConfig:
    """Makes a LlamaConfig with the key "dsmoe" of the fields of both."""

    model_type = OLD_MODEL_TYPE

    def __new__(cls, **fields: Any) -> Any:
        fields = _moved(fields)
        fields.pop("model_type")
        return transformers.LlamaConfig(**fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return transformers.LlamaConfig.from_dict(_moved(config_dict), **kwargs)


class _SparseLlama(type):
    """isinstance asks for what made these classes special: the sparse FFNs."""

    llama: str

    def __instancecheck__(cls, model: Any) -> bool:
        from dsmoe_ext.layers import find_ffns

        return type(model).__name__ == cls.llama and bool(find_ffns(model))


class DSMoELlamaForCausalLM(metaclass=_SparseLlama):
    """Old name: makes and opens LlamaForCausalLMs whose config has the key "dsmoe"."""

    llama = "LlamaForCausalLM"
    auto = "AutoModelForCausalLM"

    def __new__(cls, config: "PretrainedConfig") -> Any:
        return getattr(transformers, cls.auto).from_config(config)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return getattr(transformers, cls.auto).from_pretrained(*args, **kwargs)


class DSMoELlamaModel(DSMoELlamaForCausalLM):
    llama = "LlamaModel"
    auto = "AutoModel"
