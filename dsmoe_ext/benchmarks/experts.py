"""A mixture-of-experts layer of transformers: its implementations of the experts against "dsmoe".

    python -m dsmoe_ext.benchmarks.experts --shape 768,384 --experts 32

Every implementation computes the same module, checked against "eager" in the same dtype first.
Tokens choose their experts at random; forward in inference mode (packed in ours), forward with
backward of everything. Times are minima of interleaved rounds (`timing`).
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dsmoe_ext
from dsmoe_ext.benchmarks.machine import processor_name
from dsmoe_ext.benchmarks.timing import interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_layer(hidden_size: int, size: int, num_experts: int, dtype: torch.dtype) -> nn.Module:
    """Mixtral's experts: gate_up_proj [E,2S,H], down_proj [E,H,S]."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=hidden_size, intermediate_size=size, num_local_experts=num_experts
    )
    layer = MixtralExperts(config).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=hidden_size**-0.5)
    return layer


def call(layer: Any, implementation: str, inputs: tuple[Any, ...], train: bool) -> torch.Tensor:
    layer.config._experts_implementation = implementation
    layer.train(train)
    with torch.set_grad_enabled(train):
        y = layer(*inputs)
        if train:
            for parameter in layer.parameters():
                parameter.grad = None
            y.backward(torch.ones_like(y))
    return y.detach()


def measure(
    layer: Any, num_tokens: int, top_k: int, implementations: list[str], train: bool,
    budget: float,
) -> dict[str, float]:  # fmt: skip
    """Seconds a call by implementation."""
    num_experts, hidden_size = layer.gate_up_proj.shape[0], layer.gate_up_proj.shape[2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(layer.gate_up_proj.dtype)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    weights, index = scores.softmax(1).topk(top_k)
    inputs = (x.requires_grad_(train), index, weights.to(x.dtype).requires_grad_(train))
    expected = call(layer, "eager", inputs, train).double()
    methods: dict[str, list[Callable[..., Any]]] = {}
    for name in implementations:
        error = (call(layer, name, inputs, train).double() - expected).abs().max()
        if not error <= 16 * torch.finfo(x.dtype).eps * expected.abs().max():
            raise AssertionError(f"{name} differs from eager by {error:.3g}")
        methods[name] = [lambda name=name: call(layer, name, inputs, train)]
    return {name: timing.best for name, timing in interleaved(methods, budget).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048,704", help="hidden size and size of an expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", default="1,8,64,512", help="of the forward")
    parser.add_argument("--train-tokens", default="128,512", help="of forward and backward")
    parser.add_argument("--dtype", default="fp32,bf16")
    parser.add_argument("--implementations", default="grouped_mm,dsmoe")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    options = parser.parse_args()
    hidden_size, size = map(int, options.shape.split(","))
    names = options.implementations.split(",")
    threads = torch.get_num_threads()
    print(f"{processor_name()}, {threads} thread(s), {dsmoe_ext.build_info()['isa']}")
    print(f"H {hidden_size}, S {size}, E {options.experts}, k {options.top_k}; ms, and ratio to")
    print(f"{names[0]}\n{'':>18}" + "".join(f"{name:>20}" for name in names))
    for dtype in options.dtype.split(","):
        layer = make_layer(hidden_size, size, options.experts, DTYPES[dtype])
        for train, tokens in ((False, options.tokens), (True, options.train_tokens)):
            for num_tokens in map(int, filter(None, tokens.split(","))):
                best = measure(layer, num_tokens, options.top_k, names, train, options.budget)
                cells = [f"{1e3 * best[n]:12.3f}{best[n] / best[names[0]]:8.2f}" for n in names]
                kind = "train" if train else "forward"
                print(f"{dtype} {kind:>8} {num_tokens:>4}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
