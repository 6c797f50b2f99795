"""ResMoE's compression: barycentre, residuals, and the model that holds them."""

import itertools

import numpy as np
import pytest
import torch

import dsmoe_ext
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.offline import compress, prune
from dsmoe_ext.offline.assignment import cheapest_assignment
from dsmoe_ext.offline.compress import barycentre, low_rank

pytestmark = pytest.mark.quick
IDS = torch.arange(40).view(2, 20) % 67


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_cheapest_assignment(size, seed):
    """Against every permutation; ties and negative costs among them."""
    generator = np.random.default_rng(seed)
    rows = range(size)
    for cost in (generator.normal(size=(size, size)), generator.integers(0, 3, (size, size))):
        found = cheapest_assignment(cost.astype(float))
        best = min(cost[rows, list(p)].sum() for p in itertools.permutations(rows))
        assert sorted(found) == list(rows)
        assert cost[rows, found].sum() == pytest.approx(best)


def spread(experts, order):
    rows = torch.arange(len(experts))[:, None]
    matched = experts[rows, order]
    return (matched - matched.mean(0)).square().sum()


def test_barycentre(seed):
    """No other order of one expert's neurons is nearer to the centre; shuffled copies coincide."""
    experts = torch.randn(3, 4, 5, dtype=torch.float64)
    order, centre = barycentre(experts)
    matched = experts[torch.arange(3)[:, None], order]
    torch.testing.assert_close(centre, matched.mean(0))
    for expert in range(3):
        own = (matched[expert] - centre).square().sum()
        for other in itertools.permutations(range(4)):
            assert (experts[expert][list(other)] - centre).square().sum() >= own - 1e-9
    one = torch.randn(6, 7, dtype=torch.float64)
    copies = torch.stack([one[torch.randperm(6)] for _ in range(4)])
    order, centre = barycentre(copies)
    assert spread(copies, order) < 1e-20
    torch.testing.assert_close(centre.sort(0).values, one.sort(0).values)


def test_low_rank(seed):
    """The nearest of its rank: what is lost are the singular values left out."""
    residual = torch.randn(3, 6, 9, dtype=torch.float64)
    for rank in (1, 4, 6):
        a, b = low_rank(residual, rank)
        assert a.shape == (3, 6, rank) and b.shape == (3, rank, 9)
        lost = (residual - a @ b).square().sum((1, 2))
        values = torch.linalg.svdvals(residual)
        torch.testing.assert_close(lost, values[:, rank:].square().sum(1))


def test_equal_experts_are_not_changed(make_sparse, seed):
    """Experts that are shuffled copies of one another need no residual."""
    model = make_sparse(4, router_init="paper").eval()
    with torch.no_grad():
        for ffn in ffn_layers(model):
            orders = [torch.randperm(12) for _ in range(4)]
            for weight in ffn.expert_weights():
                weight.copy_(torch.cat([weight[:12][order] for order in orders]))
    smaller, error = compress(model, 1)
    assert error < 1e-12
    torch.testing.assert_close(smaller(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared_size", [0, 16])
def test_compressed_model(make_sparse, shared_size, tmp_path, seed):
    """Saved and loaded, packed, trained; the weights are centre and residuals; merged in order."""
    permutations = [torch.randperm(48) for _ in range(3)]
    model = make_sparse(2, shared_size=shared_size, permutations=permutations).eval()
    dense = dsmoe_ext.merge(model)
    smaller, error = compress(model, 5)
    assert 0.01 < error < 0.9
    logits = smaller(IDS).logits
    for ours, theirs in zip(ffn_layers(smaller), ffn_layers(model), strict=True):
        lost = power = 0.0
        places = theirs.permutation.argsort()[ours.permutation]
        for got, want in zip(ours.expert_weights(), theirs.expert_weights(), strict=True):
            assert torch.equal(got[:shared_size], want[:shared_size])
            lost += (got - want[places]).square().sum()
            power += want[shared_size:].square().sum()
        assert 0.005 < lost / power < 0.9
    merged = dsmoe_ext.merge(smaller)
    for name, value in merged.state_dict().items():
        want = dense.state_dict()[name]
        assert value.shape == want.shape and (value - want).norm() < want.norm(), name

    smaller.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(IDS).logits, logits)
    with torch.no_grad():
        torch.testing.assert_close(loaded.pack()(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    loaded.train()(IDS, labels=IDS).loss.backward()
    holder = ffn_layers(loaded)[0].down_proj
    assert all(p.grad.any() for n, p in holder.named_parameters() if p.numel()), holder
    with pytest.raises(ValueError, match="compressed already"):
        compress(smaller, 2)
    with pytest.raises(ValueError, match="prune first"):
        prune(smaller, [torch.ones(2)] * 3, 0.5)


def test_fused_gate_and_up(tmp_path, seed):
    """Models with gate and up in one matrix hold both halves' factors in one weight."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=67)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    dense = Phi3ForCausalLM(Phi3Config(**sizes, **heads)).eval()
    model = dsmoe_ext.sparsify(dense, 2)
    smaller, error = compress(model, 6)
    merged = dsmoe_ext.merge(smaller)
    torch.testing.assert_close(merged(IDS).logits, smaller(IDS).logits, rtol=1e-4, atol=1e-5)
    smaller.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, smaller(IDS).logits)
    assert 0.01 < error < 0.9


def test_bad_input(make_sparse):
    with pytest.raises(ValueError, match="experts of one size"):
        compress(make_sparse(expert_sizes=[20, 20, 8]), 2)
    with pytest.raises(ValueError, match="rank must lie between 1 and the 12"):
        compress(make_sparse(4), 13)
    with pytest.raises(ValueError, match="at most 6 saves some"):
        compress(make_sparse(4), 9)
