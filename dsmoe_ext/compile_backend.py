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
    inductor: Any = torch._TorchCompileInductorWrapper(mode, options, None)
    if one_row_products(graph):
        inductor.config = _WRITE_ROWS_OUT | inductor.config
    return inductor(graph, inputs)


def one_row_products(graph: fx.GraphModule) -> bool:
    """Rewrites, in place, linear(x [..,K], W [N,K], b [N]) of one row, on the CPU in 16 bits.

    Only where they are most of a graph's products, as in a step of decoding: True, if so.
    """
    found = graph.graph.find_nodes(op="call_function", target=torch.nn.functional.linear)
    products: list[Any] = [node for node in found if _has_one_row(node)]
    if 2 * len(products) <= len(found):
        return False
    for node in products:
        x, weight, bias = _operands(node)
        with graph.graph.inserting_before(node):
            row = graph.graph.call_function(torch.flatten, (x,))
            if bias is None:
                product = graph.graph.call_function(torch.mv, (weight, row))
            else:
                product = graph.graph.call_function(torch.addmv, (bias, weight, row))
            shape = (1,) * (node.meta["example_value"].dim() - 1) + (-1,)
            viewed = graph.graph.call_method("view", (product, shape))
        viewed.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(viewed)
        graph.graph.erase_node(node)
    graph.recompile()
    return True


def _operands(node: Any) -> tuple[Any, Any, Any]:
    """x, weight and bias of a linear; None for what is not given."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given.get("input"), given.get("weight"), given.get("bias")


def _has_one_row(node: Any) -> bool:
    given = [operand for operand in _operands(node) if operand is not None]
    values = [operand.meta.get("example_value") for operand in given]
    # Another kind of tensor: a quantised weight, say, whose own product is what counts.
    if len(values) < 2 or any(type(value) is not FakeTensor for value in values):
        return False
    x, weight, *bias = values
    # Autocast casts a linear's operands, but not those of what takes its place.
    dtypes = {value.dtype for value in (*values, node.meta["example_value"])}
    return (
        weight.device.type == "cpu"
        and weight.dim() == 2
        and all(value.dim() == 1 for value in bias)
        and len(dtypes) == 1
        and weight.dtype in (torch.bfloat16, torch.float16)
        and all(isinstance(size, int) and size == 1 for size in x.shape[:-1])
    )
