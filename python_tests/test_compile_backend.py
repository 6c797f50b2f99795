"""`torch.compile(..., backend="dsmoe")`: which products it makes matrix times vector."""

import pytest
import torch
from torch import nn

from dsmoe_ext.compile_backend import backend

CASES = {
    "one row": ((1, 96), torch.bfloat16, True, 1),
    "one token of a batch of one": ((1, 1, 96), torch.bfloat16, False, 1),
    "a vector": ((96,), torch.bfloat16, True, 1),
    "float16": ((1, 96), torch.float16, True, 1),
    "two rows": ((2, 96), torch.bfloat16, True, 0),
    "no rows": ((0, 96), torch.bfloat16, True, 0),
    "float32": ((1, 96), torch.float32, True, 0),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def compiled(module, found):
    def counting(graph, inputs, **settings):
        run = backend(graph, inputs, **settings)
        found.append(sum(node.target in (torch.mv, torch.addmv) for node in graph.graph.nodes))
        return run

    return torch.compile(module, backend=counting, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_products_of_one_row(case, seed):
    shape, dtype, has_bias, expected = CASES[case]
    torch.manual_seed(seed)
    linear = nn.Linear(96, 40, bias=has_bias, dtype=dtype)
    x, found = torch.randn(shape, dtype=dtype), []
    got = compiled(linear, found)(x)
    assert found == [expected]
    assert got.shape == (*shape[:-1], 40) and got.dtype == dtype
    exact = linear.double()(x.double())
    # one rounding of the result, and sums of 96 in float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=96 * 2**-23)


@torch.no_grad()
def test_a_row_made_in_the_graph(seed):
    torch.manual_seed(seed)
    block = nn.Sequential(
        nn.RMSNorm(96), nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 32)
    ).bfloat16()
    x, found = torch.randn(1, 1, 96, dtype=torch.bfloat16), []
    got = compiled(block, found)(x)
    assert found == [2]
    torch.testing.assert_close(got.double(), block.double()(x.double()), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_quantised_weights_stay_as_they_are(seed):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(seed)
    linear = nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    x, found = torch.randn(1, 96, dtype=torch.bfloat16), []
    got = compiled(linear, found)(x)
    assert found == [0]
    torch.testing.assert_close(got, linear(x), rtol=0.02, atol=0.02)


def test_gradients(seed):
    torch.manual_seed(seed)
    linear, x = nn.Linear(96, 40, dtype=torch.bfloat16), torch.randn(1, 96, dtype=torch.bfloat16)
    compiled(linear, [])(x).sum().backward()
    got = linear.weight.grad, linear.bias.grad
    linear.zero_grad()
    linear(x).sum().backward()
    torch.testing.assert_close(got, (linear.weight.grad, linear.bias.grad))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {}}])
def test_found_by_its_name_and_takes_what_the_default_takes(settings):
    linear, x = nn.Linear(8, 8).bfloat16(), torch.ones(1, 8, dtype=torch.bfloat16)
    got = torch.compile(linear, backend="dsmoe", **settings)(x)
    torch.testing.assert_close(got, linear(x), rtol=0.01, atol=0.01)


@torch.no_grad()
def test_one_row_among_many_stays_as_it_is():
    """A prompt's graph, whose head alone sees one row."""
    body, head, found = nn.Linear(16, 16).bfloat16(), nn.Linear(16, 8).bfloat16(), []
    run = compiled(lambda x: head(body(x)[-1:]), found)
    run(torch.ones(4, 16, dtype=torch.bfloat16))
    assert found == [0]


@torch.no_grad()
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast(x_dtype, dtype, seed):
    """Dtypes that a linear casts: it stays, and so does the dtype of its result."""
    torch.manual_seed(seed)
    linear, x = nn.Linear(96, 40, dtype=dtype), torch.randn(1, 96, dtype=x_dtype)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(linear, found)(x), linear(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert found == [int(dtype == x_dtype == torch.bfloat16)]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_shapes_that_only_a_linear_takes():
    x, found = torch.ones(1, 16, dtype=torch.bfloat16), []
    run = compiled(torch.nn.functional.linear, found)
    vector, matrix, row = x[0], x.expand(3, -1).contiguous(), torch.ones(1, 3).bfloat16()
    assert run(x, vector).item() == 16 and run(x, matrix, row).tolist() == [[17] * 3]
    assert found == [0, 0]
