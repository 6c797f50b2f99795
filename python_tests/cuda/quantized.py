"""Decoding from codes as the tests call it: interpreted, or on a GPU through QuantizedExperts."""

import torch
from interpreted import Interpreter
from params import DTYPE, STRUCTS
from tensors import ACTIVATION, KIND, to_torch

from dsmoe_ext.quantization.codes import MATRICES, to_tensors
from dsmoe_ext.quantization.experts import QuantizedExperts


def sparse_ffn(ops, x, gates, weights):
    """x [T,H], gates [T,E], QuantizedWeights -> y [T,H]."""
    if not isinstance(ops, Interpreter):
        experts = QuantizedExperts(weights).cuda()
        with torch.no_grad():
            return experts.sparse_ffn(x.cuda(), gates.cuda(), weights.expert_offsets.cuda()).cpu()
    ops._begin()
    p = STRUCTS["ExpertMlpQuantizedParams"](STRUCTS["ExpertMlpParams"](DTYPE[KIND[x.dtype]]))
    mlp, tensors = p.forward, dict(to_tensors(weights))
    mlp.num_tokens, mlp.hidden_size = x.shape
    mlp.intermediate_size, mlp.num_experts = len(weights.gate_proj.codes), gates.shape[1]
    (mlp.x, mlp.x_stride), mlp.gates = ops._rows(x), ops._in(gates)
    mlp.expert_offsets = ops._in(weights.expert_offsets)
    mlp.activation = ACTIVATION[weights.activation]
    has_min = weights.gate_proj.mins is not None
    p.format = STRUCTS["QuantFormat"](weights.bits, weights.group_size, has_min)
    for name in MATRICES:
        parts = (tensors.get(f"{name}.{part}") for part in ("codes", "scales", "mins"))
        addresses = (0 if part is None else ops._in(part) for part in parts)
        setattr(p, name, STRUCTS["QuantizedMatrix"](*addresses))
    y = ops._out(x.shape, x.dtype)
    mlp.y = y.address
    ops._run("run_expert_mlp_quantized", p, ops._workspace("expert_mlp_quantized_workspace", p))
    return to_torch(y.array, x.dtype)
