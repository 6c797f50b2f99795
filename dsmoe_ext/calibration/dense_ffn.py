"""One layer's dense FFN, as what is to take its place sees it: what its neurons are and say."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from torch import Tensor

from dsmoe_ext.calibration.streams import quick_dtype
from dsmoe_ext.gated_mlp import GatedMLP, mlp_activations
from dsmoe_ext.reference import ACTIVATIONS

# Starts anew on the text, chunk after chunk: the FFN's input x [t,H], and a function of what the
# dense FFN gives for it [t,H]: what it would have to give to make up for earlier layers too [t,H].
Chunks = Callable[[], Iterable[tuple[Tensor, Callable[[Tensor], Tensor]]]]


class DenseFFN:
    """The weights of a gated MLP, found by `describe`; activations in the faster of two dtypes
    (streams.quick_dtype), so perhaps in a narrower one than x."""

    def __init__(self, found: GatedMLP, weights: Sequence[Tensor]):
        self.found = found
        self._weights = weights
        self._quick = [w.to(quick_dtype(w.dtype, w.device)) for w in weights]

    @cached_property
    def down_proj_t(self) -> Tensor:
        """[I,H]"""
        return self._weights[-1].T.contiguous()

    @cached_property
    def strength(self) -> Tensor:
        """‖d_i‖ of every neuron [I]."""
        return self.down_proj_t.norm(dim=1)

    @property
    def gate_proj(self) -> Tensor:
        """[I,H]"""
        return self._weights[0][: self.found.intermediate_size]

    @property
    def up_proj(self) -> Tensor:
        """[I,H]"""
        return self._weights[-2][-self.found.intermediate_size :]

    def activate(self, x: Tensor) -> Tensor:
        """The activations a [t,I] of x [t,H], a fresh tensor."""
        return mlp_activations(x.to(self._quick[0].dtype), self._quick, self.found.activation)

    def activate_gate(self, x: Tensor) -> Tensor:
        """act(gate(x)) [t,I] alone."""
        gate = self._quick[0][: self.found.intermediate_size]
        return ACTIVATIONS[self.found.activation](x.to(gate.dtype) @ gate.T)

    def output(self, hidden: Tensor, down_proj_t: Tensor | None = None) -> Tensor:
        """[t,H] of activations [t,I], with another down_proj_t where one is given."""
        down_proj_t = self.down_proj_t if down_proj_t is None else down_proj_t
        return (hidden @ down_proj_t.to(hidden.dtype)).to(self.down_proj_t.dtype)
