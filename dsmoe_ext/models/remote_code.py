"""A file beside a saved model, for programs that import nothing by themselves.

lm-evaluation-harness, `transformers serve` and the like open a folder, and without `import
dsmoe_ext` they would get the dense model. Under trust_remote_code transformers runs what the
config's `auto_map` names: four lines that import the package.
"""

import functools
from pathlib import Path

MODULE = "dsmoe_auto"
_SOURCE = '''"""Opens this folder with its sparse feed-forward layers: pip install dsmoe_ext."""

import dsmoe_ext  # noqa: F401
import transformers


class {name}(transformers.{name}):
    pass
'''


def auto_map(model) -> dict[str, str]:
    """What the config of a saved model says: the Auto classes that have this model's class."""
    import transformers

    name = type(model).__name__
    if not hasattr(transformers, name):
        return {}
    suffix = name.removeprefix(type(model.config).__name__.removesuffix("Config"))
    auto = {"ForCausalLM": "AutoModelForCausalLM", "Model": "AutoModel"}
    auto = auto.get(suffix, f"AutoModel{suffix}")
    return {auto: f"{MODULE}.{name}"} if hasattr(transformers, auto) else {}


def saves_remote_code(save_pretrained):
    """Around PreTrainedModel.save_pretrained: writes the file beside a sparse model's config."""

    @functools.wraps(save_pretrained)
    def save(self, save_directory, *args, **kwargs):
        from dsmoe_ext.layers import find_ffns

        entry = auto_map(self) if find_ffns(self) else {}
        if entry:
            self.config.auto_map = entry
        try:
            save_pretrained(self, save_directory, *args, **kwargs)
        finally:
            if entry:
                del self.config.auto_map
        if entry and kwargs.get("is_main_process", True):
            source = _SOURCE.format(name=type(self).__name__)
            Path(save_directory, f"{MODULE}.py").write_text(source, encoding="utf-8")

    return save
