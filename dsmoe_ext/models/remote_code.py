"""A file beside a saved model, for programs that import nothing by themselves.

lm-evaluation-harness, `transformers serve` and the like open a folder, and without `import
dsmoe_ext` they would get the dense model. Under trust_remote_code transformers runs what the
config's `auto_map` names: a few lines that import the package. It names the config's class too, as
some programs read the config that way and then build the model's class themselves.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE = "dsmoe_auto"
_SOURCE = '''"""Opens this folder with its sparse feed-forward layers: pip install dsmoe_ext."""

import dsmoe_ext  # noqa: F401
import transformers


class {config}(transformers.{config}):
    pass


class {model}(transformers.{model}):
    pass
'''


def auto_map(model: "PreTrainedModel") -> dict[str, str]:
    """What the config of a saved model says: the Auto classes that have this model's classes."""
    import transformers

    name, config = type(model).__name__, type(model.config).__name__
    if not hasattr(transformers, name) or not hasattr(transformers, config):
        return {}
    suffix = name.removeprefix(config.removesuffix("Config"))
    known = {"ForCausalLM": "AutoModelForCausalLM", "Model": "AutoModel"}
    auto = known.get(suffix, f"AutoModel{suffix}")
    if not hasattr(transformers, auto):
        return {}
    return {"AutoConfig": f"{MODULE}.{config}", auto: f"{MODULE}.{name}"}


def saves_remote_code(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Around PreTrainedModel.save_pretrained: of a sparse model also the file and the card."""

    @functools.wraps(save_pretrained)
    def save(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        from dsmoe_ext.layers import find_ffns
        from dsmoe_ext.models.card import write_card

        is_sparse = bool(find_ffns(self))
        entry = auto_map(self) if is_sparse else {}
        if entry:
            self.config.auto_map = entry
        try:
            save_pretrained(self, save_directory, *args, **kwargs)
        finally:
            if entry:
                del self.config.auto_map
        if not kwargs.get("is_main_process", True):
            return
        if is_sparse:
            write_card(self, save_directory)
        if entry:
            names = {"config": type(self.config).__name__, "model": type(self).__name__}
            source = _SOURCE.format(**names)
            Path(save_directory, f"{MODULE}.py").write_text(source, encoding="utf-8")

    return save
