"""permute: exact lists of the active pairs."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import reference

pytestmark = pytest.mark.quick

SHAPES = [(0, 4), (1, 1), (1, 512), (5, 3), (300, 8), (4097, 7), (2000, 512), (70000, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("active", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(shape, active, dtype, seed):
    gates = torch.rand(shape, dtype=dtype) + 0.1
    gates *= torch.rand(shape) < active
    ours, wanted = dsmoe_ext.permute(gates), reference.permute(gates)
    for result, want in zip(ours, wanted, strict=True):
        assert result.dtype == torch.int32
        assert torch.equal(result[: len(want)], want)


def test_by_hand():
    gates = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, float("nan")]])
    pair_offsets, token_idx, token_offsets, slot_idx = dsmoe_ext.permute(gates)
    assert pair_offsets.tolist() == [0, 2, 2, 4]
    assert token_idx[:4].tolist() == [0, 2, 0, 2]
    assert token_offsets.tolist() == [0, 2, 2, 4]
    assert slot_idx[:4].tolist() == [0, 2, 1, 3]


def test_one_expert_takes_all():
    gates = torch.zeros(1000, 8)
    gates[:, 3] = 1
    pair_offsets, token_idx, _, slot_idx = dsmoe_ext.permute(gates)
    assert pair_offsets.tolist() == [0] * 4 + [1000] * 5
    assert torch.equal(token_idx[:1000], torch.arange(1000).int())
    assert torch.equal(slot_idx[:1000], torch.arange(1000).int())


def test_strided_and_expanded_gates(seed):
    gates = (torch.rand(8, 60) < 0.5).float().t()
    for strided in (gates, gates[::3], gates[:1].expand(9, 8)):
        for ours, wanted in zip(
            dsmoe_ext.permute(strided), reference.permute(strided), strict=True
        ):
            assert torch.equal(ours[: len(wanted)], wanted)


def test_same_lists_for_any_number_of_threads(seed):
    gates = (torch.rand(5000, 64) < 0.3).float()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(dsmoe_ext.permute(gates))
    finally:
        torch.set_num_threads(threads)
    num_active = int(results[0].pair_offsets[-1])
    for other in results[1:]:
        assert all(
            torch.equal(a[:num_active], b[:num_active])
            for a, b in zip(results[0], other, strict=True)
        )


def test_bad_input():
    with pytest.raises(RuntimeError, match=r"gates must have shape \[T, E\], but has \[3\]"):
        dsmoe_ext.permute(torch.zeros(3))
    with pytest.raises(RuntimeError, match="gates must be float32 or float64"):
        dsmoe_ext.permute(torch.zeros(3, 3).half())
    with pytest.raises(RuntimeError, match="split the tokens"):
        dsmoe_ext.permute(torch.zeros(1, 1).expand(2**22, 512))
