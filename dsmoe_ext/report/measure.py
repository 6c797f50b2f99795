"""What the page shows, measured: a text through the model, and what every token used."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..command_line.text import Text
from ..layers import ffn_layers
from ..training.callbacks import read_log
from ..training.evaluate import activity, evaluate, supports_bf16
from ..training.measure import ready_for_inference
from ..training.usage import watch_usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN_TOKENS = 400  # of the coloured text


@dataclass(frozen=True)
class Findings:
    """Everything on the page.

    rows: one dict a text (name, perplexity, active, tokens)
    tokens, token_share [t]: pieces of the first text, and the share of the FFN that each used
    expert_use [L,R]: how often each routed expert was on; expert_sizes [R]
    layer_share [L]: active share; position_share [N]: active share over the window
    log: rows of train.jsonl beside the model, if it was trained
    """

    name: str
    rows: list[dict[str, Any]]
    tokens: list[str]
    token_share: Tensor
    expert_use: Tensor
    layer_share: list[float]
    position_share: Tensor
    log: list[dict[str, Any]]


@torch.no_grad()
def measure(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str, texts: list[Text]
) -> Findings:
    """Runs every text through the model; colours, heat map and positions are of the first."""
    ready_for_inference(model)
    rows: list[dict[str, Any]] = []
    first: Any = None
    for text in texts:
        before = activity(model)
        with watch_usage(model) as usage:
            result = evaluate(model, text.ids, num_context=text.context, bf16=supports_bf16())
        rows.append(
            {
                "text": text.name,
                "perplexity": result.perplexity,
                "active": result.active,
                "tokens": result.num_tokens,
            }
        )
        if first is None:
            first = (usage.shares(), _use(model, before), result.active_per_layer)
    shares, expert_use, layer_share = first
    ids = texts[0].ids
    per_position = shares.mean(0).view(ids.shape)
    shown = ids.flatten()[:SHOWN_TOKENS]
    return Findings(
        name=name,
        rows=rows,
        tokens=[tokenizer.decode([token]) for token in shown.tolist()],
        token_share=shares.mean(0)[: len(shown)],
        expert_use=expert_use,
        layer_share=layer_share,
        position_share=per_position.mean(0),
        log=read_log(Path(name) / "train.jsonl") if Path(name).is_dir() else [],
    )


def _use(model: "PreTrainedModel", before: list[Tensor]) -> Tensor:
    """[L,R]: the share of tokens that used each routed expert since `before`."""
    used = []
    for ffn, now, seen in zip(ffn_layers(model), activity(model), before, strict=True):
        counts = (now - seen).sum(0).double()
        used.append(counts[ffn.num_shared : -1] / counts[-1])
    return torch.stack(used)
