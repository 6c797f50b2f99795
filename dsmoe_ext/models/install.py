"""Every transformers model whose config has the key "dsmoe" gets sparse FFNs as it is built.

`PreTrainedModel.post_init` is the last call of every model's __init__: of AutoModel..., of
`Class(config)`, of from_pretrained, of each part of a composite model. `import dsmoe_ext` wraps it,
lazily: if transformers is not imported yet, a finder waits for its modules.
"""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsmoe_ext.models import KEY
from dsmoe_ext.models.remote_code import saves_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install() -> None:
    """Called by `import dsmoe_ext`; does nothing more if transformers is not installed or used."""
    for name, adopt in _WAITING.items():
        if name in sys.modules:
            adopt(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _wrap_post_init(module: Any) -> None:
    model = getattr(module, "PreTrainedModel", None)
    if model is None or hasattr(model.post_init, "__wrapped__"):
        return
    original = model.post_init

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        config = _config_with_key(self)
        if config is not None:
            from dsmoe_ext.models.adopt import adopt

            adopt(self, config)
        original(self)

    model.post_init = post_init
    model.save_pretrained = saves_remote_code(model.save_pretrained)


def _config_with_key(model: "PreTrainedModel") -> Any:
    """The config with the key: the model's own, or that of the part that holds the FFNs."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(getattr(config, KEY, None), dict):
            return config
    return None


def _register_legacy(module: Any) -> None:
    from dsmoe_ext.models.legacy import DSMoELlamaConfig

    module.AutoConfig.register(DSMoELlamaConfig.model_type, DSMoELlamaConfig, exist_ok=True)


def _register_experts(module: Any) -> None:
    from dsmoe_ext.experts import register

    register(module)


_WAITING = {
    "transformers.modeling_utils": _wrap_post_init,
    "transformers.models.auto.configuration_auto": _register_legacy,
    "transformers.integrations.moe": _register_experts,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the modules, and does what is waiting once one has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _WAITING:
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(place, self)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _WAITING[name](module)

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec
