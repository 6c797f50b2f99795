"""The CUDA ops as the tests call them: on a GPU through dsmoe_ext where there is one, else
interpreted."""

import pytest
import torch
from interpreted import Interpreter

from dsmoe_ext.cuda_settings import cuda_settings


class Gpu:
    """dsmoe_ext.ops on CUDA tensors, with CPU tensors in and out. Takes what Interpreter takes: an
    arch other than 90a asks for the kernels of any GPU."""

    def __init__(self, seed=None, counters=None, arch=None, multiprocessors=None, **settings):
        from dsmoe_ext import ops

        self.ops = ops
        self.activation = "silu"
        self.settings = ({} if arch in (None, "90a") else {"path": "sm80"}) | settings

    def router(self, *inputs):
        given = (None if t is None else t.cuda() for t in inputs)
        with cuda_settings(**self.settings):
            return self.ops.router_logits(*given).cpu()

    def router_backward(self, dlogits, x, weight, wants_dx=True, wants_dweight=True):
        wanted = (wants_dx, wants_dweight)
        given = (dlogits.cuda(), x.cuda(), weight.cuda())
        with cuda_settings(**self.settings):
            gradients = torch.ops.dsmoe.router_backward(*given, *wanted)
        return tuple(g.cpu() if w else None for g, w in zip(gradients, wanted, strict=True))

    def permute(self, gates, capacity=None):
        if capacity is not None:
            raise NotImplementedError("the op allocates T·E")
        lists = tuple(t.cpu() for t in self.ops.permute(gates.cuda()))
        active = int(lists[0][-1])  # the lists have room for T·E
        return lists[0], lists[1][:active], lists[2], lists[3][:active]

    def route(self, logits, threshold, expert_offsets, **options):
        return tuple(
            t.cpu()
            for t in self.ops.route(logits.cuda(), threshold, expert_offsets.cuda(), **options)
        )

    def route_backward(
        self,
        dgates,
        dscores,
        gates_out,
        scores,
        expert_offsets,
        *,
        method="threshold",
        top_k=0,
        gates="scores",
        rescale=True,
        gate_scale=1.0,
    ):
        options = self.ops._route_options(method, top_k, gates, rescale, gate_scale)
        given = (dgates, dscores, gates_out, scores, expert_offsets)
        given = (None if t is None else t.cuda() for t in given)
        return torch.ops.dsmoe.route_backward(*given, *options).cpu()

    def sparse_ffn(self, *inputs):
        with cuda_settings(**self.settings):
            given = (t.cuda() for t in inputs)
            return self.ops.sparse_ffn(*given, activation=self.activation).cpu()

    def sparse_ffn_backward(
        self, *inputs, dy, grad_weight=None, without=(), save_activations=False
    ):
        names = ("x", "gates", "gate_proj", "up_proj", "down_proj_t")
        leaves = {n: t.cuda() for n, t in zip(names, inputs, strict=False)}
        wanted = [t.requires_grad_() for n, t in leaves.items() if f"d{n}" not in without]
        weight = None if grad_weight is None else grad_weight.cuda()
        options = dict(grad_weight=weight, save_activations=save_activations)
        options["activation"] = self.activation
        with cuda_settings(**self.settings):
            y = self.ops.sparse_ffn(*leaves.values(), inputs[5].cuda(), **options)
            gradients = torch.autograd.grad(y, wanted, dy.cuda())
        left = [f"d{n}" for n in names if f"d{n}" not in without]
        return {n: g.cpu() for n, g in zip(left, gradients, strict=True)}


ON_GPU = torch.cuda.is_available()
Ops = Gpu if ON_GPU else Interpreter
interpreter_only = pytest.mark.skipif(ON_GPU, reason="asks the interpreter")
