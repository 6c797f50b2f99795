"""The card of a saved sparse model, README.md beside its weights: what it is, what was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmoe_ext.files import CARD, CARD_MARK, is_ours
from dsmoe_ext.layers import find_ffns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = """---
library_name: transformers
tags: [dsmoe]
---
{mark}

# {name} with sparse feed-forward layers

A `{name}` whose feed-forward layers are cut into experts; a router picks for every token those that
it needs. Made with [dsmoe_ext](https://pypi.org/project/dsmoe_ext).

| | |
|---|---|
{facts}

{measured}

## How to load it

```python
import dsmoe_ext  # pip install dsmoe_ext
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("...")  # this folder
```

Programs that import nothing by themselves take `trust_remote_code=True`, which runs `dsmoe_auto.py`
of this folder. Without either, transformers opens the dense model of the same weights.
"""


def write_card(
    model: "PreTrainedModel", folder: str | Path, rows: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes README.md of a sparse model into its folder, unless somebody else's lies there.

    rows: of `dsmoe eval` (command_line.steps.evaluation_rows), measured on this model.
    """
    place = Path(folder, CARD)
    if is_ours(place):
        place.write_text(card_text(model, rows), encoding="utf-8")


def card_text(model: "PreTrainedModel", rows: Sequence[dict[str, Any]] = ()) -> str:
    """Method, layout, target, and per text the perplexity and the share of the FFN in use."""
    ffn = find_ffns(model)[0]
    from dsmoe_ext.models.options import options_of

    options = options_of(model)
    sizes = sorted(set(ffn.sizes[ffn.num_shared :]))
    form = f"of {sizes[0]} neurons" if len(sizes) == 1 else f"of {sizes[0]} to {sizes[-1]} neurons"
    facts = {
        "router": f"{options['method']}, {options['gates']} gates",
        "experts of a layer": f"{ffn.num_experts} {form}",
        "always on": f"{ffn.shared_size} of {ffn.intermediate_size} neurons",
    }
    if options["target_active"] is not None:
        facts["target"] = f"{options['target_active']:.2f} of the feed-forward layers active"
    if options["quantization"]:
        facts["experts' weights"] = f"{options['quantization']['bits']} bits"
    return _TEXT.format(
        mark=CARD_MARK,
        name=type(model).__name__,
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        measured=_measured(rows) if rows else "`dsmoe eval` measures perplexity and active share.",
    )


def _measured(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"| {row['text']} | {row['window']} | {row['predicted_tokens']} | {row['perplexity']:.2f} "
        f"| {row['active_ffn']:.3f} |"
        for row in rows
    ]
    head = "| text | window | predicted tokens | perplexity | FFN active |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines)
