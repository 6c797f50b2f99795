"""The op of a linear router, with derivatives of any order: they are the same products.

Its kernels sum in float32 (float64 in a float64 layer), whatever the dtype of the tokens.
"""

import torch
from torch import Tensor

from dsmoe_ext import _C  # noqa: F401  registers the ops
from dsmoe_ext.gradients import empty_gradients, only_wanted

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


def _products(dlogits, x, weight, wants_dx, wants_dweight):
    """dx and dweight. Autocast would make the CPU's products, which are torch's, in a half type."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _ops.router_backward(dlogits, x, weight, wants_dx, wants_dweight)
    return _ops.router_backward(dlogits, x, weight, wants_dx, wants_dweight)


def _router_backward(ctx, dlogits):
    *wanted, wants_dbias = ctx.needs_input_grad
    made = _products(dlogits, *ctx.saved_tensors, *wanted)
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
    wants_dlogits, wants_x, wants_weight, *_ = ctx.needs_input_grad
    parts, of_x, of_weight = [], None, None
    if ctx.made_dx and ddx is not None:
        if wants_dlogits:
            parts.append(_ops.router(ddx, weight, None))
        if wants_weight:
            of_weight = _products(dlogits, ddx, weight, False, True)[1]
    if ctx.made_dweight and ddweight is not None:
        if wants_dlogits:
            parts.append(_ops.router(x, ddweight, None))
        if wants_x:
            of_x = _products(dlogits, x, ddweight, True, False)[0]
    return sum(parts) if parts else None, of_x, of_weight, None, None


torch.library.register_autograd(
    "dsmoe::router_backward",
    _router_double_backward,
    setup_context=_router_backward_setup_context,
)
