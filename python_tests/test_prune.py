"""Experts dropped by use: what is left computes what it computed, and saves and loads."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.offline import expert_use, prune

pytestmark = pytest.mark.quick
IDS = torch.arange(60).view(3, 20) % 67


@pytest.mark.parametrize("options", [{}, {"shared_size": 16, "gates": "binary"}])
def test_unused_experts_are_not_missed(make_sparse, tmp_path, options, seed):
    """Experts that no token uses can go without any change of the output."""
    model = make_sparse(4, rescale=False, **options).eval()
    for layer, ffn in enumerate(ffn_layers(model)):
        with torch.no_grad():
            ffn.router.bias[[0, 3, 1][layer]] = -100.0
    want = model(IDS).logits
    use = expert_use(model, IDS)
    assert [int(shares.argmin()) for shares in use] == [0, 3, 1]
    pruned = prune(model, use, 0.75)
    torch.testing.assert_close(pruned(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(IDS).logits, want)  # the original stays
    routed = 48 - options.get("shared_size", 0)
    assert pruned.config.intermediate_size == 48 - routed // 4
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, pruned(IDS).logits)
    pruned.train()(IDS, labels=IDS).loss.backward()


def test_use(make_sparse, seed):
    """Against the gates themselves."""
    model = make_sparse(4).eval()
    seen = []
    ffn = ffn_layers(model)[1]
    handle = ffn.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    model(IDS)
    handle.remove()
    gates = ffn.route(seen[0].flatten(0, 1)).gates
    torch.testing.assert_close(expert_use(model, IDS)[1], (gates != 0).double().mean(0))


def test_what_cannot_be_pruned(make_sparse, make_llama):
    model = make_sparse(4, method="top_k", top_k=3)
    use = expert_use(model, IDS)
    with pytest.raises(ValueError, match="top_k=3 needs"):
        prune(model, use, 0.5)
    with pytest.raises(ValueError, match="leaves 0"):
        prune(model, use, 0.0)
    unequal = dsmoe_ext.sparsify(make_llama(), expert_sizes=[20, 28])
    with pytest.raises(ValueError, match="one size"):
        prune(unequal, expert_use(unequal, IDS), 0.5)
