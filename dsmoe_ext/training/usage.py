"""How many experts each token used: what a histogram or a coloured text is made of."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from ..layers import find_ffns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsmoe_ext.ffn import DSMoEFFN


class Usage:
    """What the tokens used, for every layer and token seen, in the order in which they were seen.

    experts() [L,T] int32: routed experts that were on.
    shares() [L,T] float32: neurons that were on, as a share of the FFN.
    """

    def __init__(self, num_layers: int):
        self._experts: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._shares: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def _watch(self, layer: int, ffn: "DSMoEFFN") -> Callable[..., None]:
        weight = ffn.expert_offsets.diff().float() / ffn.intermediate_size

        def note(gates: torch.Tensor) -> None:
            on = gates != 0
            self._experts[layer].append(on[:, ffn.num_shared :].sum(1).to("cpu", torch.int32))
            self._shares[layer].append((on * weight).sum(1).cpu())

        return note

    def experts(self) -> torch.Tensor:
        return torch.stack([torch.cat(parts) for parts in self._experts])

    def shares(self) -> torch.Tensor:
        return torch.stack([torch.cat(parts) for parts in self._shares])

    def histogram(self, num_bins: int = 10) -> tuple[list[float], list[float]]:
        """Of experts per token and layer: (the bins' edges, the share of (token, layer) in each).

        The lowest and highest number that occur are the outermost edges.
        """
        experts = self.experts().flatten().double()
        edges = torch.linspace(experts.min().item(), experts.max().item() + 1, num_bins + 1)
        counts = torch.histogram(experts, edges.double()).hist
        return edges.tolist(), (counts / counts.sum()).tolist()


@contextlib.contextmanager
def watch_usage(model: "PreTrainedModel") -> Iterator[Usage]:
    """Collects every token's experts inside the block; of a dense model there is nothing."""
    layers = find_ffns(model)
    usage = Usage(len(layers))
    with contextlib.ExitStack() as stack:
        for index, ffn in enumerate(layers):
            watcher = usage._watch(index, ffn)
            stack.enter_context(ffn.activity.watched_by(watcher))
        yield usage
