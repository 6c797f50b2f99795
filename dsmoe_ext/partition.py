"""Which neurons form an expert: a permutation of the FFN's intermediate dimension I.

Cutting an FFN into experts is cutting I into slices, so a partition is a permutation that is
applied before the cut (row i of the sparse FFN is neuron `permutation[i]` of the dense one) and a
list of slice sizes. The dense function does not change; what changes is how much of it a token can
do without (docs/calibration.md has the figures).

    contiguous    the order of the dense model
    random        any order (LLaMA-MoE's independent split)
    gate_rows     balanced k-means of the rows of gate_proj (MoEfication, EMoE)
    coactivation  balanced k-means of how strongly the neurons contribute over tokens

calibration/neurons.py groups by the predictable part of the contributions, with the same k-means.

Everything here runs on plain tensors of any device; on the CPU it is deterministic for a given seed
(on CUDA the sums of k-means have no fixed order).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def split_sizes(num_neurons: int, expert_size: int) -> list[int]:
    """Sizes of the experts of `num_neurons`: about `expert_size` each, differing by 1 at most."""
    if num_neurons < 1 or expert_size < 1:
        raise ValueError(f"cannot cut {num_neurons} neurons into experts of {expert_size}")
    num_experts = max(1, round(num_neurons / expert_size))
    small, extra = divmod(num_neurons, num_experts)
    return [small + 1] * extra + [small] * (num_experts - extra)


def shared_split(intermediate_size: int, expert_size: int, shared: float) -> tuple[int, list[int]]:
    """Cut I into an always-on part and routed experts: (shared_size, sizes of the routed experts).

    The shared part takes what does not divide: it grows by less than one expert so that every
    routed expert has exactly `expert_size` neurons, the size that the kernels are tiled for.
    Without a shared part the sizes differ by 1 at most.
    """
    if not 0 <= shared < 1:
        raise ValueError(f"shared must be at least 0 and below 1, not {shared}")
    if not 1 <= expert_size <= intermediate_size:
        raise ValueError(f"expert_size must be 1 to {intermediate_size}, not {expert_size}")
    if shared == 0:
        return 0, split_sizes(intermediate_size, expert_size)
    num_experts = (intermediate_size - round(shared * intermediate_size)) // expert_size
    if num_experts < 1:
        raise ValueError(
            f"shared={shared} of {intermediate_size} neurons leaves less than one expert of "
            f"{expert_size}"
        )
    return intermediate_size - num_experts * expert_size, [expert_size] * num_experts


def contiguous(intermediate_size: int) -> Tensor:
    """The order of the dense model: int64 [I]."""
    return torch.arange(intermediate_size)


def random_order(intermediate_size: int, *, seed: int = 0) -> Tensor:
    """A random order, the same for the same seed: int64 [I]."""
    return torch.randperm(intermediate_size, generator=torch.Generator().manual_seed(seed))


def gate_rows(gate_proj: Tensor, expert_sizes: Sequence[int], *, seed: int = 0) -> Tensor:
    """Neurons with similar gate directions together. gate_proj [I,H] -> permutation int64 [I]."""
    rows = torch.nn.functional.normalize(gate_proj.float(), dim=1)
    return balanced_kmeans(rows, expert_sizes, seed=seed)


def coactivation(contributions: Tensor, expert_sizes: Sequence[int], *, seed: int = 0) -> Tensor:
    """Neurons that matter for the same tokens together. contributions [T,I] -> int64 [I].

    The profiles are centred over the tokens: what counts is when a neuron is stronger than usual,
    not how strong it is.
    """
    profiles = (contributions - contributions.mean(dim=0)).T.contiguous()
    return balanced_kmeans(profiles.float(), expert_sizes, seed=seed)


def balanced_kmeans(
    features: Tensor,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    max_iterations: int = 20,
    start: Tensor | None = None,
) -> Tensor:
    """Cluster n points into clusters of given sizes (squared Euclidean distance).

    features [n,d] float, sum(sizes) == n -> permutation int64 [n]: cluster 0's points first, then
    cluster 1's, ...; inside a cluster in ascending order. Lloyd's iterations from a k-means++
    start, or from the points start int64 [k]; the best assignment seen is kept.
    """
    num_points = features.shape[0]
    if features.dim() != 2 or sum(sizes) != num_points or min(sizes) < 1:
        raise ValueError(
            f"{len(sizes)} clusters of {sum(sizes)} points in all do not fit features of shape "
            f"{tuple(features.shape)}"
        )
    capacity = np.asarray(sizes, dtype=np.int64)
    device = features.device
    sizes_column = torch.tensor(capacity, device=device, dtype=features.dtype)[:, None]
    start = _spread_start(features, len(sizes), seed) if start is None else start
    centres = features[start]  # [k,d]
    best_cost, best = float("inf"), np.zeros(0)
    previous = None
    for _ in range(max_iterations):
        # |f - c|² without |f|², which is the same for every cluster
        distance = centres.square().sum(dim=1) - 2 * features @ centres.T  # [n,k]
        labels = _assign(distance.double().cpu().numpy(), capacity)
        if previous is not None and np.array_equal(labels, previous):
            break
        previous = labels
        index = torch.from_numpy(labels).to(device)
        centres = torch.zeros_like(centres).index_add_(0, index, features) / sizes_column
        # within-cluster sum of squares, up to the constant sum |f|²
        cost = -(centres.square().sum(dim=1, keepdim=True) * sizes_column).sum().item()
        if cost < best_cost:
            best_cost, best = cost, labels
    return torch.from_numpy(np.argsort(best, kind="stable"))


def _spread_start(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """k-means++: each next centre is drawn in proportion to its squared distance. -> int64 [k]."""
    generator = torch.Generator().manual_seed(seed)
    norms = features.square().sum(dim=1)
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64)
    chosen = [min(int(draws[0] * len(features)), len(features) - 1)]
    nearest = None
    for draw in draws[1:]:
        centre = features[chosen[-1]]
        distance = (norms - 2 * features @ centre + centre.square().sum()).clamp_(min=0)
        distance[chosen] = 0
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        cumulative = nearest.double().cpu().cumsum(0)
        position = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
        if position >= len(features) or position in chosen:  # identical points: any unused one
            position = next(i for i in range(len(features)) if i not in set(chosen))
        chosen.append(position)
    return torch.tensor(chosen, device=features.device)


def _assign(distance: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Nearest cluster with room, the most decided points first. distance [n,k] -> labels int64 [n].

    The most decided are those that lose most if their nearest cluster is full.
    """
    if distance.shape[1] == 1:
        return np.zeros(len(distance), dtype=np.int64)
    two_best = np.partition(distance, 1, axis=1)
    order = np.argsort(two_best[:, 0] - two_best[:, 1], kind="stable")  # most decided first
    room = capacity.copy()
    labels = np.empty(len(distance), dtype=np.int64)
    closed = np.zeros(len(capacity))  # +inf where a cluster is full
    for point in order:
        label = int(np.argmin(distance[point] + closed))
        labels[point] = label
        room[label] -= 1
        if room[label] == 0:
            closed[label] = np.inf
    return labels
