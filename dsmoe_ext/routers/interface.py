"""What a router is, and how one is found by name.

A router sits in front of `ops.sparse_ffn` and decides everything about it: it makes the gates from
the FFN's input. So a method (docs/methods.md) is a class like those beside this file, never a
second way through the FFN.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dsmoe_ext.balance import balance_loss
from dsmoe_ext.ops import Routing
from dsmoe_ext.reference import METHODS


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """float64 stays, everything else becomes float32."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def without_half_casts(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What Module._apply is given, with its device moves, but float32 in place of half types."""

    def moved(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if out.is_floating_point() and out.itemsize < 4:
            return tensor.to(out.device, torch.float32)
        return out

    return moved


class Router(nn.Module):
    """Two steps: the module itself makes logits [T,R] of x [T,H] of any dtype, and `pick` makes of
    them Routing(gates [T,E], scores [T,R]); all float32 (float64 of float64).

    A gate of 0 means that the token skips the expert. The first E - R experts are shared: their
    gates are 1. Balance and sparsity losses look at the scores.

    hidden_size    H
    expert_sizes   neurons of every expert, shared ones first: E numbers
    num_shared     E - R
    options        the method's own, by name; their defaults stand in the class's `defaults`

    A subclass implements `forward` and `pick`, reads `self.options`, and may set these:
    knob           the attribute that trades quality for work without training (see `turn`)
    balance_form   the form of `balance_loss` that the method trains with, or None
    needs_gate_proj  whether `forward` looks at the FFN's gate_proj
    """

    defaults: ClassVar[dict[str, Any]] = {}
    knob: ClassVar[str | None] = None
    balance_form: ClassVar[str | None] = None
    needs_gate_proj: ClassVar[bool] = False

    def __init__(
        self,
        hidden_size: int,
        expert_sizes: Sequence[int],
        num_shared: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        self.hidden_size = hidden_size
        self.expert_sizes = list(expert_sizes)
        self.num_shared = num_shared
        self.num_experts = len(self.expert_sizes) - num_shared  # R
        if self.num_experts < 1:
            raise ValueError(
                f"a router needs a routed expert, but of {len(self.expert_sizes)} experts "
                f"{num_shared} are shared"
            )
        if unknown := sorted(set(options) - set(self.defaults)):
            raise TypeError(
                f"{type(self).__name__} has no option {unknown[0]!r}; "
                f"it has {', '.join(self.defaults) or 'none'}"
            )
        self.options = self.defaults | options
        self._offsets: Tensor | None = None

    def forward(self, x: Tensor, gate_proj: Tensor | None = None) -> Tensor:
        """What the choice is made from, [T,R]. gate_proj [I,H]: the FFN's own, for routers that
        need it; None for others."""
        raise NotImplementedError

    def pick(self, logits: Tensor, threshold: Tensor | None = None) -> Routing:
        """The rule alone. threshold: 0-d, the FFN's, for routers that have one; None: their own."""
        raise NotImplementedError

    def route(self, x: Tensor, gate_proj: Tensor | None = None) -> Routing:
        """Both steps, for a router that stands alone."""
        return self.pick(self(x, gate_proj))

    def balance(self, routing: Routing, token_mask: Tensor | None = None) -> Tensor | None:
        """The balance loss of one layer that the method trains with, 0-d; None: it has none."""
        if self.balance_form is None:
            return None
        return balance_loss(routing, form=self.balance_form, token_mask=token_mask)

    def start_step(self, step: int) -> None:
        """Called before every optimiser step, for methods that draw something once a step."""

    def join(self, layer: int, first: "Router") -> None:
        """Called once all layers have routers, for methods that share a part between layers."""

    def start_dense(self) -> None:
        """Starts the layer as near to the dense FFN as the method can, if it has a say in it."""

    def reset_buffers(self, is_loaded: Callable[[Tensor], bool]) -> None:
        """Buffers as the options say, but those that is_loaded (of a checkpoint without them)."""
        for name, buffer in self.named_buffers(recurse=False):
            if not is_loaded(buffer):
                value = self.options[name]
                buffer.fill_(self.num_experts if value is None else value)

    def turn(self, value: float) -> None:
        """Sets the knob: more or fewer experts from now on, without training."""
        if self.knob is None:
            raise ValueError(f"{type(self).__name__} has no knob to turn")
        old = getattr(self, self.knob)
        if self.knob == "top_k" and not 1 <= value <= self.num_experts:
            raise ValueError(f"top_k must lie between 1 and {self.num_experts}, got {value:g}")
        if isinstance(old, Tensor):
            old.fill_(value)
        else:
            setattr(self, self.knob, type(old)(value))

    def routing(self, scores: Tensor, mask: Tensor, values: Tensor | None = None) -> Routing:
        """Routing of scores [T,R] and active pairs mask [T,R]; the gates are values, or scores.

        The gradient passes straight through the mask, as that of `ops.route` does.
        """
        values = scores if values is None else values
        kept = torch.where(mask, values, 0.0).detach() + values - values.detach()
        shared = kept.new_ones(len(kept), self.num_shared)
        return Routing(torch.cat([shared, kept], dim=1), scores)

    def offsets(self, device: torch.device) -> Tensor:
        """expert_offsets int32 [E+1] on the tokens' device; derived, so in no checkpoint."""
        if self._offsets is None or self._offsets.device != device:
            sizes = torch.tensor([0, *self.expert_sizes], device=device)
            self._offsets = sizes.cumsum(0, dtype=torch.int32)
        return self._offsets

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(without_half_casts(fn), recurse)  # one logit decides over an expert


_BY_NAME: dict[str, type[Router]] = {}


def register(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: from now on the router is found by this name."""

    def add(router: type[Router]) -> type[Router]:
        if name in _BY_NAME:
            raise ValueError(f"{name!r} is the name of {_BY_NAME[name].__name__}; pick another")
        _BY_NAME[name] = router
        return router

    return add


def router_names() -> list[str]:
    """The names that are registered."""
    return sorted(_BY_NAME)


def router_class(name: str) -> type[Router]:
    """The class registered under name."""
    if name not in _BY_NAME:
        raise ValueError(f"there is no router {name!r}; there are {', '.join(router_names())}")
    return _BY_NAME[name]


def default_balance(method: str) -> str | None:
    """The form of balance loss that an FFN of this method trains with if nothing else is said; the
    rules of `ops.route` train with the sparsity loss. None also for a name that nobody knows."""
    return None if method in METHODS else getattr(_BY_NAME.get(method), "balance_form", None)


def make_router(
    name: str,
    hidden_size: int,
    expert_sizes: Sequence[int],
    num_shared: int,
    options: dict[str, Any],
    *,
    is_dense_start: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """The registered router of an FFN, from its options that are not None.

    Options that every FFN has (threshold, top_k, ...) are left out where the router has none such.
    """
    router = router_class(name)
    common = ("threshold", "top_k", "bias", "gate_scale", "rescale", "gates", "noise")
    given = {
        option: value
        for option, value in options.items()
        if value is not None and (option in router.defaults or option not in common)
    }
    made = router(hidden_size, expert_sizes, num_shared, device=device, dtype=dtype, **given)
    if is_dense_start:
        made.start_dense()
    return made


def float_of(x: Tensor) -> torch.dtype:
    """The dtype of the gates of tokens x."""
    return at_least_float32(x.dtype)
