"""LLaMA with DSMoEFFN layers for transformers; each name loads transformers when it is first
used."""

import importlib

_WHERE = {
    "DSMoELlamaConfig": "configuration",
    "DSMoELlamaModel": "modeling",
    "DSMoELlamaForCausalLM": "modeling",
}

__all__ = ["DSMoELlamaConfig", "DSMoELlamaForCausalLM", "DSMoELlamaModel"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
