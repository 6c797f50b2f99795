"""The op of a linear router, with derivatives of any order: they are the same products.

Its kernels sum in float32 (float64 in a float64 layer), whatever the dtype of the tokens.
"""

import torch
from torch import Tensor

from dsmoe_ext import _C  # noqa: F401  registers the ops

_ops = torch.ops.dsmoe


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """logits [T,R] = x [T,H] @ weight.T + bias, in float32 whatever x is (float64 if x is).

    weight [R,H] and bias [R] have that dtype. On the CPU x is widened a cache block at a time. On
    CUDA products are exact float32, whatever torch.backends.cuda.matmul says of TF32, and H must
    be a multiple of 8.
    """
    return _ops.router(x, weight, bias)


@torch.library.register_fake("dsmoe::router")
def _(x, weight, bias):
    return weight.new_empty(x.shape[0], weight.shape[0])


def _router_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _router_backward(ctx, dlogits):
    *wanted, wants_dbias = ctx.needs_input_grad
    made = _ops.router_backward(dlogits, *ctx.saved_tensors, *wanted)
    return *only_wanted(made, wanted), dlogits.sum(0) if wants_dbias else None


torch.library.register_autograd(
    "dsmoe::router", _router_backward, setup_context=_router_setup_context
)


@torch.library.register_fake("dsmoe::router_backward")
def _(dlogits, x, weight, *wanted):
    return empty_gradients((x, weight), wanted)


def _router_backward_setup_context(ctx, inputs, output):
    *tensors, ctx.made_dx, ctx.made_dweight = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _router_double_backward(ctx, ddx, ddweight):
    """The same products once more."""
    dlogits, x, weight = ctx.saved_tensors
    parts, of_x, of_weight = [], None, None
    if ctx.made_dx and ddx is not None:
        parts.append(_ops.router(ddx, weight, None))
        of_weight = _ops.router_backward(dlogits, ddx, weight, False, True)[1]
    if ctx.made_dweight and ddweight is not None:
        parts.append(_ops.router(x, ddweight, None))
        of_x = _ops.router_backward(dlogits, x, ddweight, True, False)[0]
    return sum(parts) if parts else None, of_x, of_weight, None, None


torch.library.register_autograd(
    "dsmoe::router_backward",
    _router_double_backward,
    setup_context=_router_backward_setup_context,
)


# -- for every op that makes only those gradients that are wanted --


def only_wanted(gradients, wanted):
    """None in place of those that are not."""
    return [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]


def empty_gradients(inputs, wanted):
    """What a backward op returns, for register_fake: no elements where nothing is wanted."""
    return tuple(
        t.new_empty(t.shape if is_wanted else 0)
        for t, is_wanted in zip(inputs, wanted, strict=True)
    )
