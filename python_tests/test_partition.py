"""Partitions are permutations, balanced as asked, deterministic, and find groups that are there."""

import pytest
import torch

from dsmoe_ext import partition

pytestmark = pytest.mark.quick


def assert_permutation(order, size):
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(size))


@pytest.mark.parametrize(
    "sizes", [[16] * 6, [7, 7, 6, 6], [1] * 20, [30], [40, 3, 1]], ids=lambda sizes: str(len(sizes))
)
@pytest.mark.parametrize("method", ["gate_rows", "coactivation"])
def test_permutation_with_exact_sizes(sizes, method, seed):
    num_neurons = sum(sizes)
    features = torch.randn(num_neurons, 12)
    given = features if method == "gate_rows" else features.T
    order = getattr(partition, method)(given, sizes, seed=3)
    assert_permutation(order, num_neurons)
    # Deterministic, whatever the global generator did in between.
    torch.rand(5)
    assert torch.equal(order, getattr(partition, method)(given, sizes, seed=3))
    for expert in order.split(sizes):
        assert torch.equal(expert, expert.sort().values)


def test_contiguous():
    assert_permutation(partition.contiguous(10), 10)


def planted(sizes):
    """(36 points around four centres far apart, which centre each is of)."""
    group = torch.arange(4).repeat_interleave(torch.tensor(sizes))[torch.randperm(36)]
    return 10 * torch.eye(4, 8)[group] + 0.1 * torch.randn(36, 8), group


def test_finds_planted_groups(seed):
    features, group = planted([9] * 4)
    found = group[partition.balanced_kmeans(features, [9] * 4, seed=0)].view(4, 9)
    assert (found == found[:, :1]).all()


def test_groups_that_do_not_fit(seed):
    """Each group of 10 loses a neuron to the group that has room. On its way it may push one out of
    either of the other two, because neurons are placed one after another."""
    features, group = planted([10, 10, 10, 6])
    found = group[partition.balanced_kmeans(features, [9] * 4, seed=0)].view(4, 9)
    most = found.mode(dim=1, keepdim=True).values
    assert most.unique().numel() == 4
    assert 36 - 3 - 3 * 2 <= (found == most).sum() <= 36 - 3


def test_clusters_beat_random_ones(seed):
    features = torch.randn(12, 20).repeat_interleave(8, dim=0) + torch.randn(96, 20)
    shuffled = features[torch.randperm(96)]

    def spread(order):
        groups = shuffled[order].view(12, 8, -1)
        return (groups - groups.mean(dim=1, keepdim=True)).square().sum()

    order = partition.balanced_kmeans(shuffled, [8] * 12, seed=0)
    assert spread(order) < 0.75 * spread(torch.arange(96))


def test_identical_and_dead_neurons():
    for features in (torch.ones(24, 5), torch.zeros(24, 5)):
        assert_permutation(partition.balanced_kmeans(features, [4] * 6, seed=1), 24)


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [(96, 16, [16] * 6), (100, 16, [17] * 4 + [16] * 2), (5, 16, [5]), (17, 3, [3] * 5 + [2])],
)
def test_split_sizes(total, size, expected):
    assert partition.split_sizes(total, size) == expected


@pytest.mark.parametrize(
    ("total", "size", "shared", "expected"),
    [
        (1536, 16, 0.25, (384, [16] * 72)),
        (5632, 32, 0.25, (1408, [32] * 132)),
        (1000, 16, 0.25, (264, [16] * 46)),  # 250 shared leave 14 over: they are shared too
        (100, 16, 0.0, (0, [17] * 4 + [16] * 2)),
    ],
)
def test_shared_split(total, size, shared, expected):
    assert partition.shared_split(total, size, shared) == expected
    assert expected[0] + sum(expected[1]) == total


@pytest.mark.parametrize(
    ("size", "shared", "message"),
    [(16, 1.0, "shared"), (16, -0.1, "shared"), (101, 0.25, "expert_size"), (0, 0.25, "1 to 100")],
)
def test_shared_split_errors(size, shared, message):
    with pytest.raises(ValueError, match=message):
        partition.shared_split(100, size, shared)
    with pytest.raises(ValueError, match="less than one expert"):
        partition.shared_split(100, 40, 0.8)


def test_wrong_shapes():
    with pytest.raises(ValueError, match="do not fit"):
        partition.balanced_kmeans(torch.randn(10, 3), [4, 4])
