"""What active_fraction counts: every token once, padding never, for each reader."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import DSMoEFFN
from dsmoe_ext.statistics import MAX_PENDING, ActivityCounter, active_share

pytestmark = pytest.mark.quick


def random_ffn() -> DSMoEFFN:
    """H 24; a shared expert of 8 and routed ones of 4 to 16; about half of the pairs active."""
    ffn = DSMoEFFN(24, 40, expert_sizes=[16, 4, 12], shared_size=8, router_init="paper")
    torch.nn.init.normal_(ffn.router.weight, std=0.4)
    return ffn


def share_of(ffn: DSMoEFFN, x: torch.Tensor) -> float:
    _, routing = ffn(x, return_routing=True)
    used = (routing.gates != 0) * ffn.expert_offsets.diff()
    return (used.sum(1).double().mean() / 40).item()


def test_padding_is_left_out(seed):
    ffn = random_ffn()
    x = torch.randn(4, 10, 24)
    mask = torch.rand(4, 10) < 0.6
    for size in (10, 1):  # many tokens at once, and the way of decoding
        for piece, kept in zip(x.split(size, 1), mask.split(size, 1), strict=True):
            ffn(piece, token_mask=kept)
        read = dsmoe_ext.active_fraction(ffn)
        assert read.num_tokens == mask.sum()
        assert read.mean == read.per_layer[0] == pytest.approx(share_of(ffn, x[mask]))
    assert dsmoe_ext.active_fraction(ffn).num_tokens == 0
    ffn(x)
    assert dsmoe_ext.active_fraction(ffn).num_tokens == 40


def test_since_the_last_read(seed):
    layers = torch.nn.Sequential(random_ffn(), random_ffn())
    first = dsmoe_ext.active_fraction(layers)
    assert math.isnan(first.mean) and first.num_tokens == 0
    for num_tokens in (3, 100, 1):
        x = torch.randn(num_tokens, 24)
        want = [share_of(layers[0], x), share_of(layers[1], layers[0](x))]
        dsmoe_ext.active_fraction(layers)
        layers(x)
        read = dsmoe_ext.active_fraction(layers)
        assert read.per_layer == pytest.approx(want) and read.num_tokens == num_tokens
        assert read.mean == pytest.approx(sum(want) / 2)


def test_counts_of_experts(seed):
    """Waiting batches, large ones, masks, training and evaluation all end in the same counts."""
    counter = ActivityCounter(3)
    want = torch.zeros(2, 4, dtype=torch.int64)
    for step in range(2 * MAX_PENDING + 5):
        gates = torch.randn(1 + step % 30, 3) * (torch.rand(1 + step % 30, 3) < 0.5)
        mask = torch.rand(len(gates)) < 0.5 if step % 3 == 0 else None
        kept = gates if mask is None else gates[mask]
        training = step % 2 == 0
        counter.train(training).add(gates.requires_grad_(), mask)
        want[int(training), :3] += (kept != 0).sum(0)
        want[int(training), 3] += len(kept)
    assert torch.equal(counter.totals(), want)
    assert torch.equal(counter.read(), want.sum(0))
    assert counter.read().sum() == 0
    offsets = torch.tensor([0, 2, 3, 10], dtype=torch.int32)
    counts = torch.tensor([5, 4, 2, 10])
    assert active_share(counts, offsets) == (5 * 2 + 4 * 1 + 2 * 7) / 100


COUNT_UNDER_DDP = """
import sys, torch
from dsmoe_ext import DSMoEFFN
rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
)
ffn = DSMoEFFN(24, 40, 4)
model = torch.nn.parallel.DistributedDataParallel(ffn)
for _ in range(3):
    model(torch.randn(20 + 10 * rank, 24)).sum().backward()
print(ffn.activity.totals()[1, -1].item())
torch.distributed.destroy_process_group()
"""


def test_every_process_counts_its_own_tokens(tmp_path):
    """DistributedDataParallel broadcasts buffers: what is counted must not be one."""
    command = [sys.executable, "-c", COUNT_UNDER_DDP]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [int(p.communicate(timeout=120)[0]) for p in processes] == [3 * 20, 3 * 30]


def test_counts_need_no_loader():
    """Built on the meta device, as loaders do, and given memory afterwards."""
    with torch.device("meta"):
        ffn = DSMoEFFN(24, 40, 4)
    ffn.to_empty(device="cpu")
    assert torch.equal(ffn.activity.totals(), torch.zeros(2, 4 + 1, dtype=torch.int64))


def test_copies_and_moves_lose_nothing(seed):
    ffn = random_ffn().eval()
    with torch.no_grad():
        ffn(torch.randn(2, 24))
    for other in (copy.deepcopy(ffn), pickle.loads(pickle.dumps(ffn)), copy.deepcopy(ffn).double()):
        assert dsmoe_ext.active_fraction(other).num_tokens == 2
    assert "activity.counts" not in ffn.state_dict()
    with torch.inference_mode():
        ffn(torch.randn(3, 24))
    assert dsmoe_ext.active_fraction(ffn).num_tokens == 5


def test_layer_made_in_inference_mode(seed):
    with torch.inference_mode():
        ffn = random_ffn().eval()
    with torch.no_grad():
        ffn(torch.randn(2, 24))
    assert dsmoe_ext.active_fraction(ffn).num_tokens == 2
