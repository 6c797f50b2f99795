"""What was active: per-expert counts kept by every DSMoEFFN, and the shares read from them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

# Decoding sees one token at a time and cannot afford four small torch calls a layer for statistics.
# So up to this many small batches wait as they are and are counted together.
MAX_PENDING = 64
MAX_PENDING_TOKENS = 16


class ActivityCounter(nn.Module):
    """Counts the tokens that used each expert. Counts only grow; readers keep what they saw last.

    counts [2,E+1] int64: row 0 in evaluation, row 1 in training; the last column is the number of
    tokens. Never read on the host while the model runs. Not a buffer: DistributedDataParallel would
    overwrite it with the first process's before every forward.
    """

    def __init__(self, num_experts: int, device: torch.device | str | None = None):
        super().__init__()
        self.num_experts = num_experts
        # Loaders build modules on the meta device and then fill in parameters and buffers alone.
        on_cpu = device is None or torch.device(device).type == "meta"
        device = "cpu" if on_cpu else device
        with torch.inference_mode(False):  # or no later forward could add to it
            self.counts = torch.zeros(2, num_experts + 1, dtype=torch.int64, device=device)
        self._pending: list[tuple[Tensor, Tensor | None, bool]] = []
        self._watchers: list[Callable[[Tensor], None]] = []
        self._last_read: Tensor | None = None

    def add(self, gates: Tensor, token_mask: Tensor | None = None) -> None:
        """Counts gates [T,E] that are not 0, but not of tokens whose token_mask [T] is False."""
        if torch.compiler.is_exporting():  # the program that is made is another model
            return
        gates = gates.detach() if gates.requires_grad else gates
        for watcher in self._watchers:
            watcher(gates)
        if torch.compiler.is_compiling() or len(gates) > MAX_PENDING_TOKENS or not gates.is_cpu:
            self._count(gates, token_mask, self.training)
            return
        self._pending.append((gates, token_mask, self.training))
        if len(self._pending) >= MAX_PENDING:
            self._flush()

    @contextlib.contextmanager
    def watched_by(self, watcher: Callable[[Tensor], None]) -> Iterator[None]:
        """Hands every batch's gates [T,E] to watcher(gates) inside the block."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def _count(self, gates: Tensor, token_mask: Tensor | None, training: bool) -> None:
        if self.counts.device != gates.device:
            with torch.inference_mode(False):  # as above
                self.counts = self.counts.to(gates.device)
        used = gates != 0
        tokens: int | Tensor = gates.shape[0]
        if token_mask is not None:
            token_mask = token_mask.to(gates.device)
            used = used & token_mask.unsqueeze(1)
            tokens = token_mask.sum()
        row = self.counts[int(training)]
        row[:-1].add_(used.sum(0))
        row[-1:].add_(tokens)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        groups: dict[tuple[bool, bool], list[tuple[Tensor, Tensor | None]]] = {}
        for gates, mask, training in pending:
            groups.setdefault((mask is not None, training), []).append((gates, mask))
        for (has_mask, training), batches in groups.items():
            masks = [mask for _, mask in batches if mask is not None]
            mask = torch.cat(masks) if has_mask else None
            self._count(torch.cat([gates for gates, _ in batches]), mask, training)

    def totals(self) -> Tensor:
        """A copy of the counts so far, [2,E+1] int64."""
        self._flush()
        return self.counts.clone()

    def read(self) -> Tensor:
        """The counts since the last read, training and evaluation together: [E+1] int64."""
        totals, before = self.totals(), self._last_read
        self._last_read = totals
        return (totals if before is None else totals - before.to(totals.device)).sum(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._flush()  # before counts move to another device than the batches in waiting
        device = fn(self.counts).device
        if device.type != "meta":
            self.counts = self.counts.to(device)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        self._flush()  # copies and pickles hold numbers, not batches in waiting
        return self.__dict__.copy()


def active_share(counts: Tensor, expert_offsets: Tensor) -> Tensor:
    """Share of the neurons that the average token used, fp64 0-d, from counts [E+1].

    NaN if no token was counted.
    """
    sizes = expert_offsets.diff().to(counts)
    return (counts[:-1] * sizes).sum().double() / (counts[-1] * sizes.sum()).double()
