"""`torch.compile(..., backend="dsmoe")`: which products it makes matrix times vector."""

import pytest
import torch
from torch import nn

from dsmoe_ext.compile_backend import backend, one_row_products

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
        found.append(one_row_products(graph))
        return backend(graph, inputs, **settings)

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
