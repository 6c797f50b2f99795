"""`torch.compile(model, backend="dsmoe")`: inductor, with matrix times vector for one row.

Decoding one token multiplies every weight by one row, which costs what reading the weights costs.
On the CPU torch hands such a product in 16 bits to a matrix multiplication, which takes up to twice
as long.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

# A row that goes into a product is written out first: fused into it, as inductor likes to, its
# normalisation would be computed once for every row of the weight.
_WRITE_ROWS_OUT = {"realize_opcount_threshold": 0}


def backend(
    graph: fx.GraphModule,
    inputs: list[Tensor],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """A Dynamo backend: what inductor makes of `graph` after one_row_products.

    mode, options: torch.compile's own, as its default backend takes them.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    settings = (list_mode_options(mode) if mode else {}) | (options or {})
    if one_row_products(graph):
        settings = _WRITE_ROWS_OUT | settings
    return compile_fx(graph, inputs, config_patches=settings)


def one_row_products(graph: fx.GraphModule) -> int:
    """Rewrites, in place, every linear(x [..,K], W [N,K], b [N]) of one row, on the CPU in 16 bits.

    Returns how many there were.
    """
    linear = graph.graph.find_nodes(op="call_function", target=torch.nn.functional.linear)
    products: list[Any] = [node for node in linear if _has_one_row(node)]
    for node in products:
        x, weight, bias = (*node.args, node.kwargs.get("bias"))[:3]
        with graph.graph.inserting_before(node):
            row = graph.graph.call_function(torch.flatten, (x,))
            if bias is None:
                product = graph.graph.call_function(torch.mv, (weight, row))
            else:
                product = graph.graph.call_function(torch.addmv, (bias, weight, row))
            shape = tuple(node.meta["example_value"].shape)
            viewed = graph.graph.call_method("view", (product, shape))
        viewed.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(viewed)
        graph.graph.erase_node(node)
    graph.recompile()
    return len(products)


def _has_one_row(node: Any) -> bool:
    if len(node.args) < 2:
        return False
    x, weight = (argument.meta.get("example_value") for argument in node.args[:2])
    if type(x) is not FakeTensor or type(weight) is not FakeTensor:  # a quantised weight, say
        return False
    rows = x.shape[:-1]
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and all(isinstance(size, int) and size == 1 for size in rows)
    )
