"""Text that a model says itself: what to calibrate on, or distil on, where there is no other text.

    x_1 drawn from the starts, x_{i+1} ~ softmax(logits(x_1 .. x_i) / temperature)

Drawn from the dense model, it covers what the model knows, in the proportions in which it knows it,
and nothing of the user's. Whole batches go through the model at once, with its key-value cache:
what takes time is reading the weights, once for a token of every row.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Rows that are drawn together. More would save little: reading and growing the cache takes over.
BATCH_ROWS = 128
# Share of the rows that begin like a document (with BOS); the others begin with a random token,
# which leads to places where BOS never does (an instruct model's BOS to conversations only).
DOCUMENT_STARTS = 0.5


@torch.no_grad()
def sample_text(
    model: "PreTrainedModel",
    num_windows: int,
    length: int = 256,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Windows int64 [num_windows, length] drawn from a causal language model, on the CPU.

    temperature: 1 draws as the model says; lower is tidier text, and less varied. advance(n) is
    called after every n tokens. The same seed gives the same text on the same machine.

    Raises ValueError for a length below 2 or a temperature that is not above 0.
    """
    if length < 2 or num_windows < 1:
        raise ValueError(f"no text in {num_windows} windows of {length} tokens; 1 of 2 at least")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    was_training = model.training
    model.eval()
    parts = []
    try:
        for rows in torch.arange(num_windows).split(BATCH_ROWS):
            ids = _starts(model.config, len(rows), generator)
            parts.append(_continue(model, ids, length, temperature, generator, advance).cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts)


def _starts(config: "PretrainedConfig", num_rows: int, generator: torch.Generator) -> Tensor:
    """First tokens int64 [num_rows, 1]: BOS for some rows, any token for the others."""
    ids = torch.randint(
        config.vocab_size, (num_rows, 1), generator=generator, device=generator.device
    )
    if config.bos_token_id is not None:
        ids[: round(DOCUMENT_STARTS * num_rows)] = config.bos_token_id
    return ids


def _continue(
    model: "PreTrainedModel",
    ids: Tensor,
    length: int,
    temperature: float,
    generator: torch.Generator,
    advance: Callable[[int], None] | None,
) -> Tensor:
    """Draws every row of ids [N,1] up to `length` tokens. int64 [N,length]."""
    text = [ids]
    cache = _cache_for(model, length)
    for _ in range(length - 1):
        out = model(input_ids=text[-1], cache=cache, use_cache=True)
        cache = out.cache
        text.append(_draw(out.logits[:, -1].float().div_(temperature), generator))
        if advance:
            advance(len(ids))
    return torch.cat(text, dim=1)


def _cache_for(model: "PreTrainedModel", length: int) -> DynamicCache:
    """An empty cache of the model's kind, with room for `length` tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _RoomForAll(length) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class _RoomForAll(DynamicLayer):
    """A layer's keys and values [N,heads,L,d] in memory that is taken once for all `length` tokens.

    transformers' own grows by a copy of everything for every token.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.room = [
            states.new_empty(*states.shape[:2], self.length, states.shape[3])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of logits [N,V], as int64 [N,1]: where the cumulated probability passes a
    uniform number. Several times as fast as torch.multinomial, which draws V numbers a row."""
    below = logits.softmax(dim=-1).cumsum(dim=-1)
    point = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    return torch.searchsorted(below, point * below[:, -1:]).clamp_(max=logits.shape[1] - 1)
