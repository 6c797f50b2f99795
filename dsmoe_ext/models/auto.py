"""Makes AutoConfig and AutoModelForCausalLM know "dsmoe_llama" as soon as dsmoe_ext is imported, at
no cost.

Importing transformers' model code takes seconds, and registering a class needs the class. So the
config mapping gets a subclass that imports dsmoe_ext.models.modeling, which registers itself, when
"dsmoe_llama" is first looked up. If transformers is not imported yet, a finder waits for the module
of that mapping.
"""

import importlib.abc
import importlib.util
import sys

MODEL_TYPE = "dsmoe_llama"
_MAPPING_MODULE = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Called by `import dsmoe_ext`; does nothing more if transformers is not installed or never
    used."""
    if _MAPPING_MODULE in sys.modules:
        _extend(sys.modules[_MAPPING_MODULE])
    elif not any(isinstance(finder, _MappingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MappingFinder())


def _extend(module) -> None:
    mapping = getattr(module, "CONFIG_MAPPING", None)
    if mapping is None or getattr(mapping, "_knows_dsmoe", False):
        return

    class LazyConfigMapping(type(mapping)):
        _knows_dsmoe = True

        def __getitem__(self, key):
            if key == MODEL_TYPE:
                importlib.import_module("dsmoe_ext.models.modeling")
            return super().__getitem__(key)

        def __contains__(self, key):
            return key == MODEL_TYPE or super().__contains__(key)

    LazyConfigMapping.__name__ = type(mapping).__name__
    mapping.__class__ = LazyConfigMapping


class _MappingFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the module, and extends the mapping once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _MAPPING_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _extend(module)

            spec.loader.exec_module = exec_module
        return spec
