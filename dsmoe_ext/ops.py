"""The three ops, registered in torch's dispatcher for CPU and CUDA: route, permute, expert_mlp. A
linear router's is in router_op.py.

Shapes: T tokens, H hidden_size, I intermediate_size, E experts, R = E - num_shared routed experts,
A active pairs. `sparse_ffn` is the public face of expert_mlp.
The same functions in plain PyTorch stand in `dsmoe_ext.reference`.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmoe_ext import _C, cuda_settings
from dsmoe_ext.gradients import empty_gradients, only_wanted, refuse_create_graph
from dsmoe_ext.packing import PackedWeights, pack_quantized, pack_weights  # noqa: F401
from dsmoe_ext.reference import GATES, METHODS, activation_index

if os.environ.get("DSMOE_ISA"):
    _C.force_isa(os.environ["DSMOE_ISA"])
if not (os.environ.get("DSMOE_KEPT_BYTES") or "0").isdecimal():
    raise ValueError(
        "DSMOE_KEPT_BYTES must be a whole number of bytes, such as 536870912, "
        f"but is {os.environ['DSMOE_KEPT_BYTES']!r}."
    )
cuda_settings.apply(cuda_settings.from_environment())

if os.environ.get("DSMOE_TRACE"):
    from dsmoe_ext.trace import Trace

    Trace(os.environ["DSMOE_TRACE"]).__enter__()  # for as long as the process lives

_ops = torch.ops.dsmoe


class Routing(NamedTuple):
    """What `route` returns."""

    gates: Tensor
    scores: Tensor


class Permutation(NamedTuple):
    """What `permute` returns; all int32."""

    pair_offsets: Tensor
    token_idx: Tensor
    token_offsets: Tensor
    slot_idx: Tensor


def build_info() -> dict[str, Any]:
    """Version, torch built against, compiler, CUDA (empty: none) and the most experts that it
    takes, instruction sets, the one in use, and whether the CPU's tiles (AMX) are usable."""
    return _C.build_info()


# -------------------------------------------------------------------------------------------- route


def route(
    logits: Tensor,
    threshold: Tensor | float,
    expert_offsets: Tensor,
    *,
    method: str = "threshold",
    top_k: int = 0,
    gates: str = "scores",
    rescale: bool = True,
    gate_scale: float = 1.0,
) -> Routing:
    """Turns router logits into scores and gates.

    Args:
        logits: [T,R]; computed in float32 whatever the dtype, float64 stays.
        threshold: one number: tau of "threshold", the probability mass of "top_p". It gets no
            gradient, and a tensor that wants one is refused.
        expert_offsets: int32 [E+1]; E - R shared experts come first and always have gate 1.
        method: "threshold" (DSMoE, arXiv 2502.12455: sigmoid, active iff score > tau),
            "top_p" (XMoE, 2403.18926: softmax, active while the mass ranked before is below t),
            "top_k" (MoDSE, 2409.12210: softmax over the k largest), "relu" (ReMoE, 2412.14711).
        gates: "scores" or "binary" (1 where active).
        rescale: multiply a token's gates by I_routed / (sum of its active routed sizes), which
            is E/k for equal sizes.
        gate_scale: constant factor on every routed gate.

    Returns:
        gates [T,E], 0 = inactive, and scores [T,R], float32 (float64 for float64 logits). The
        gradient of gates passes straight through the threshold, at inactive pairs too (DSMoE's
        straight-through estimator); the factors are constants for it.
    """
    options = _route_options(method, top_k, gates, rescale, gate_scale)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if isinstance(threshold, Tensor):
        if threshold.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "route has no gradient for its threshold (the mask jumps there): detach it, and "
                "move it by a rule such as ThresholdController."
            )
        threshold = threshold.to(logits.device, torch.float32)
    else:  # filled on the device: a copy from the host would wait for it
        threshold = torch.full((), threshold, dtype=torch.float32, device=logits.device)
    return Routing(*_ops.route(logits, threshold, expert_offsets, *options))


def _route_options(
    method: str, top_k: int, gates: str, rescale: bool, gate_scale: float
) -> tuple[Any, ...]:
    """As the C++ ops take them."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but is {method!r}.")
    if gates not in GATES:
        raise ValueError(f"gates must be one of {', '.join(GATES)}, but is {gates!r}.")
    return METHODS.index(method), top_k, gates == "binary", rescale, gate_scale


@torch.library.register_fake("dsmoe::route")
def _(logits, threshold, expert_offsets, method, top_k, binary, rescale, gate_scale):
    gates = logits.new_empty(logits.shape[0], expert_offsets.shape[0] - 1)
    return gates, torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("dsmoe::route_backward")
def _(dgates, dscores, gates, scores, *options):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _route_setup_context(ctx, inputs, output):
    _, _, expert_offsets, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # zeros for an output that nobody used cost a pass over memory
    ctx.save_for_backward(*output, expert_offsets)


def _route_backward(ctx, dgates, dscores):
    refuse_create_graph("route")
    gates, scores, expert_offsets = ctx.saved_tensors
    if dgates is None:
        dgates = torch.zeros_like(gates)
    dlogits = _ops.route_backward(dgates, dscores, gates, scores, expert_offsets, *ctx.options)
    return dlogits, *[None] * 7


torch.library.register_autograd("dsmoe::route", _route_backward, setup_context=_route_setup_context)


# ------------------------------------------------------------------------------------------ permute


def permute(gates: Tensor) -> Permutation:
    """Lists the active pairs (gate != 0) of gates [T,E], float32 or float64.

    Returns:
        pair_offsets [E+1] and token_idx: the tokens of expert e, ascending, are
        token_idx[pair_offsets[e]:pair_offsets[e+1]]; token_offsets [T+1] and slot_idx: where token
        t's pairs stand in token_idx, experts ascending. The two lists have length T*E, of which
        the first A = pair_offsets[E] entries are valid.
    """
    return Permutation(*_ops.permute(gates))


@torch.library.register_fake("dsmoe::permute")
def _(gates):
    num_tokens, num_experts = gates.shape
    lengths = (num_experts + 1, num_tokens * num_experts, num_tokens + 1, num_tokens * num_experts)
    return tuple(gates.new_empty(n, dtype=torch.int32) for n in lengths)


# --------------------------------------------------------------------------------------- sparse_ffn


def sparse_ffn(
    x: Tensor,
    gates: Tensor,
    gate_proj: Tensor | PackedWeights,
    up_proj: Tensor | None = None,
    down_proj_t: Tensor | None = None,
    expert_offsets: Tensor | None = None,
    *,
    activation: str = "silu",
    grad_weight: Tensor | None = None,
    save_activations: bool = True,
) -> Tensor:
    """y_t = sum over active experts e of gates[t,e] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e.

    Call it as `sparse_ffn(x, gates, gate_proj, up_proj, down_proj_t, expert_offsets)` or, for
    inference on the CPU, as `sparse_ffn(x, gates, packed)`. (DSMoE, arXiv 2502.12455, section 3.)

    Args:
        x: [T,H] float32, bfloat16, float16 or float64; any strides. On CUDA no float64, H a
            multiple of 8, and at most build_info()["max_cuda_experts"] experts; rows that are not
            aligned to 16 bytes, and 8 elements apart or a multiple of that, are copied.
        gates: [T,E] float32 (float64 if x is); 0 = the token skips the expert; any scale already
            applied.
        gate_proj, up_proj, down_proj_t: [I,H] like x, neurons in rows; expert e owns rows
            expert_offsets[e]:expert_offsets[e+1] of all three. Or [E,S,H], where all experts have
            S neurons. up_proj None: gate_proj is [2I,H] or [E,2S,H], all of gate's neurons before
            all of up's. Views of the tensors that models have: `down_proj.weight.t()` of a Linear,
            `down_proj.transpose(1, 2)` of [E,H,S]. Gradients come in the layout of these tensors.
        expert_offsets: int32 [E+1], from 0 to I; sizes may differ and may be 0.
        activation: of gate's neurons, "silu", "gelu_tanh" or "gelu" (torch's names for its two
            kinds); packed weights have their own.
        grad_weight: [T,E] like gates: weight of the gates' gradient at inactive pairs. None: 0
            (STE "active"); ones: exact; 1/p at drawn pairs, else 0: sampled. Its cost falls in the
            backward alone.
        save_activations: keep x Wg and x Wu of the active pairs for the backward: 2·I elements of
            x's dtype a token are reserved, and touched for active pairs only. False: compute them
            again, 2/9 more work.

    float32 on CUDA is multiplied exactly, or in TF32 where torch.backends.cuda.matmul allows it.

    Returns:
        y [T,H] like x. Gradients that nobody needs cost nothing. The same bits for any number of
        threads. It can be differentiated once, by torch.autograd, not by torch.func.
    """
    if isinstance(gate_proj, PackedWeights):
        return _sparse_ffn_packed(x, gates, gate_proj)
    if down_proj_t is None or expert_offsets is None:
        raise TypeError(
            "sparse_ffn takes (x, gates, packed) or all of gate_proj, up_proj, down_proj_t and "
            "expert_offsets; up_proj may be None where gate_proj holds both."
        )
    weights = (gate_proj, up_proj, down_proj_t)
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, gates, *weights)
    )
    save = save_activations and wants_grad
    tf32 = x.is_cuda and _allows_tf32()
    inputs = (
        x, gates, *weights, expert_offsets, grad_weight, activation_index(activation), save, tf32
    )  # fmt: skip
    if wants_grad and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return _SparseFFN.apply(*inputs)
    return _ops.expert_mlp(*inputs)[0]


def _allows_tf32() -> bool:
    """What torch is told for its own float32 matmuls; newer versions have more than one setting,
    of which this is the resolved one."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


# Dynamo cannot trace the setting. This is what torch.compiler.assume_constant_result sets, which
# imports all of Dynamo to do so: 0.7 s for everyone who never compiles.
setattr(_allows_tf32, "_dynamo_marked_constant", True)  # noqa: B010


@torch.library.register_fake("dsmoe::expert_mlp")
def _(
    x, gates, gate_proj, up_proj, down_proj_t, expert_offsets, grad_weight, activation,
    save_activations, allow_tf32,
):  # fmt: skip
    num_kept = 2 * x.shape[0] * down_proj_t.shape[:-1].numel() if save_activations else 0
    return x.new_empty(x.shape), x.new_empty(num_kept)


@torch.library.register_fake("dsmoe::expert_mlp_backward")
def _(
    dy, x, gates, gate_proj, up_proj, down_proj_t, expert_offsets, grad_weight, activations,
    activation, allow_tf32, *wanted,
):  # fmt: skip
    *most, ddown = empty_gradients((x, gates, gate_proj, up_proj, down_proj_t), wanted)
    if wanted[-1] and down_proj_t.stride(-1) != 1 and down_proj_t.stride(-2) == 1:
        ddown = down_proj_t.new_empty(down_proj_t.mT.shape).mT
    return *most, ddown


def _expert_mlp_setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _, ctx.allow_tf32 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _expert_mlp_backward(ctx, dy, dactivations):
    refuse_create_graph("sparse_ffn")
    if dy is None:
        return (None,) * 10
    wanted = ctx.needs_input_grad[:5]
    options = (ctx.activation, ctx.allow_tf32)
    gradients = _ops.expert_mlp_backward(dy, *ctx.saved_tensors, *options, *wanted)
    return *only_wanted(gradients, wanted), *[None] * 5


torch.library.register_autograd(
    "dsmoe::expert_mlp", _expert_mlp_backward, setup_context=_expert_mlp_setup_context
)


class _SparseFFN(torch.autograd.Function):
    """The registered op's autograd with less Python around it: 29 us of the smallest call's 118.
    Compilers and tracers want the op itself."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _ops.expert_mlp(*inputs)
        _expert_mlp_setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, dy):
        return _expert_mlp_backward(ctx, dy, None)


def _sparse_ffn_packed(x: Tensor, gates: Tensor, packed: PackedWeights) -> Tensor:
    _refuse_gradients(x, gates)
    return _ops.expert_mlp_packed(x, gates, *_packed_arguments(packed))


def _packed_arguments(packed: PackedWeights) -> tuple[Any, ...]:
    """As the C++ ops take them."""
    sizes = (packed.hidden_size, packed.intermediate_size)
    return packed.data, packed.expert_offsets, *sizes, activation_index(packed.activation)


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "Packed weights are for inference: use torch.no_grad(), or the weights themselves for "
            "gradients."
        )


def routed_ffn(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    threshold: Tensor,
    packed: PackedWeights,
    *,
    method: str = "threshold",
    top_k: int = 0,
    gates: str = "scores",
    rescale: bool = True,
    gate_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(y [T,H], gates [T,E]): linear router, `route` and `sparse_ffn` in one call, for inference.

    Args:
        x: [T,H] in the dtype of the packed weights.
        router_weight, router_bias: [R,H] and [R] or None, float32 (float64 if x is).
        threshold: 0-d float32 tensor. The other options are those of `route`.
    """
    _refuse_gradients(x, router_weight)
    options = _route_options(method, top_k, gates, rescale, gate_scale)
    weights = _packed_arguments(packed)
    return _ops.routed_ffn(x, router_weight, router_bias, threshold, *weights, *options)


@torch.library.register_fake("dsmoe::expert_mlp_packed")
def _(x, gates, packed, expert_offsets, hidden_size, intermediate_size, activation):
    return x.new_empty(x.shape)


@torch.library.register_fake("dsmoe::expert_mlp_quantized")
def _(x, gates, *weights):
    return x.new_empty(x.shape)


@torch.library.register_fake("dsmoe::routed_ffn")
def _(x, router_weight, router_bias, threshold, packed, expert_offsets, *options):
    gates = router_weight.new_empty(x.shape[0], expert_offsets.shape[0] - 1)
    return x.new_empty(x.shape), gates
