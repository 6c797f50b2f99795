"""Which part of the FFN's weights a token has to read, and several tokens together.

A method skips channels: columns of gate and up, neurons, experts. Alone a token reads those that
are on for it; a batch reads the union, so that what is skipped shrinks with its size, and the
faster the more the tokens' choices differ. Routers do not count: ours has 1.6 % of the weights
of an FFN of SmolLM2, CMoE's a quarter of a percent, TEAL and CATS have none.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration.dense_ffn import DenseFFN
from ..layers import find_ffns
from .replaced import replaced_ffns
from .skipping import Skipping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .bench import Bench

BATCHES = (1, 8, 64)
# About so many tokens of a text are remembered, a layer: several batches of the largest size.
SAMPLED = 512


class Reads:
    """What the FFNs of a model read on a text of num_tokens, layer after layer."""

    def __init__(self, num_layers: int, num_tokens: int):
        # Odd, so that the sample takes other positions in every window.
        self.step = max(1, num_tokens // SAMPLED) // 2 * 2 + 1
        self.seen = [0] * num_layers
        self.read = [0.0] * num_layers  # summed over the tokens
        self.sample: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.channels: list[Tensor] = [torch.empty(0)] * num_layers

    def add(self, layer: int, on: Tensor, channels: Tensor) -> None:
        """Takes in tokens' channels on, bool [T,C]; channels [C]."""
        self.read[layer] += _share(on, channels).sum().item()
        first = -self.seen[layer] % self.step
        self.sample[layer].append(on[first :: self.step].cpu())
        self.seen[layer] += len(on)
        self.channels[layer] = channels

    @property
    def active(self) -> list[float]:
        """The share that the average token reads, by layer."""
        return [read / seen for read, seen in zip(self.read, self.seen, strict=True)]

    def together(self, size: int) -> float:
        """The share that `size` tokens from all over the text read together."""
        shares = []
        for parts, channels in zip(self.sample, self.channels, strict=True):
            on = torch.cat(parts)
            batches = max(1, len(on) // size)
            union = torch.stack([on[start::batches][:size].any(0) for start in range(batches)])
            shares.append(_share(union, channels).mean().item())
        return sum(shares) / len(shares)


def _share(on: Tensor, channels: Tensor) -> Tensor:
    return on.to(channels.dtype) @ channels.to(on.device)


@contextlib.contextmanager
def reads_of_skipping(
    dense: "PreTrainedModel", ffns: Sequence[Skipping], reads: Reads
) -> Iterator[None]:
    """The dense model with the ffns in place of its own, which note what they read."""

    def output(layer: int, skipping: Skipping, ffn: DenseFFN, x: Tensor) -> Tensor:
        y, on = skipping.run(ffn, x)
        reads.add(layer, on, skipping.channels(ffn))
        return y

    with replaced_ffns(dense, [functools.partial(output, *each) for each in enumerate(ffns)]):
        yield


@contextlib.contextmanager
def reads_of_experts(sparse: "PreTrainedModel", reads: Reads) -> Iterator[None]:
    """A model of DSMoEFFNs, whose experts on are noted."""
    with contextlib.ExitStack() as stack:
        for layer, ffn in enumerate(find_ffns(sparse)):
            sizes = ffn.expert_offsets.diff().double() / ffn.intermediate_size

            def note(gates: Tensor, layer: int = layer, sizes: Tensor = sizes) -> None:
                reads.add(layer, gates != 0, sizes)

            stack.enter_context(ffn.activity.watched_by(note))
        yield


def losses_and_reads(
    bench: "Bench",
    model: "PreTrainedModel",
    num_layers: int,
    noting: Callable[[Reads], contextlib.AbstractContextManager[None]],
) -> dict[str, Any]:
    """What Bench.losses_in_place gives, with active shares as they are read, and "batches": the
    share that so many tokens read together, by text and number.

    noting(reads): the context in which the model fills them.
    """
    row: dict[str, Any] = {"loss": {}, "active": {}, "layers": {}, "batches": {}}
    for text in bench.texts:
        reads = Reads(num_layers, text.ids.numel())
        with noting(reads):
            row["loss"][text.name] = bench.evaluate(model, text).loss
        row["layers"][text.name] = reads.active
        row["active"][text.name] = sum(reads.active) / num_layers
        row["batches"][text.name] = {str(size): reads.together(size) for size in BATCHES}
    return row
