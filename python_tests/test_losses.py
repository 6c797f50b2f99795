"""Sparsity and balance losses against their formulas; the controllers as closed loops."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import DSMoEFFN, LambdaController, ThresholdController
from dsmoe_ext.losses import sparsity_loss, sparsity_sum
from dsmoe_ext.ops import Routing, route

pytestmark = pytest.mark.quick


def random_routing(sizes, num_shared=0, gates="scores", num_tokens=13):
    """(routing, logits, offsets); the mask is mixed."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    logits = torch.randn(num_tokens, len(sizes) - num_shared, dtype=torch.float64)
    logits.requires_grad_()
    routing = route(logits, 0.5, offsets, gates=gates, gate_scale=1.7)
    return Routing(*routing), logits, offsets


@pytest.mark.parametrize("num_shared", [0, 1])
def test_sparsity_of_scores(num_shared, seed):
    """L1 of G, not of the scaled gate, over tokens; gradient to active gates only."""
    routing, logits, offsets = random_routing([6, 4, 4, 8, 2], num_shared)
    loss = sparsity_loss(routing, offsets)
    loss.backward()
    num_routed = logits.shape[1]
    s = logits.detach().sigmoid()
    active = s > 0.5
    assert 0 < active.sum() < active.numel()
    torch.testing.assert_close(loss, (s * active).sum() / (13 * num_routed))
    torch.testing.assert_close(logits.grad, active * s * (1 - s) / (13 * num_routed))


def test_sparsity_of_binary_gates(seed):
    """The size-weighted mean of s over the routed pairs; the shared expert stays out."""
    routing, logits, offsets = random_routing([30, 4, 4, 8, 2], 1, "binary")
    loss = sparsity_loss(routing, offsets, binary=True)
    weights = torch.tensor([4, 4, 8, 2], dtype=torch.float64) / 18
    s = logits.sigmoid()
    torch.testing.assert_close(loss, (s * weights).sum(1).mean())
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], s * (1 - s) * weights / 13, check_dtype=False
    )


@pytest.mark.parametrize("binary", [False, True])
def test_sparsity_mask(binary, seed):
    routing, _, offsets = random_routing([6, 4, 4, 8, 2], 0, "binary" if binary else "scores")
    mask = torch.rand(13) < 0.5
    kept = Routing(routing.gates[mask], routing.scores[mask])
    masked = sparsity_loss(routing, offsets, binary=binary, token_mask=mask)
    torch.testing.assert_close(masked, sparsity_loss(kept, offsets, binary=binary))
    parts = [
        sparsity_sum(Routing(routing.gates[rows], routing.scores[rows]), offsets, binary=binary)
        for rows in (slice(0, 4), slice(4, 13))
    ]
    torch.testing.assert_close(sum(parts), sparsity_sum(routing, offsets, binary=binary))

    spoilt = Routing(routing.gates.clone(), routing.scores.clone())
    spoilt.scores[~mask] = float("nan")
    assert torch.equal(sparsity_loss(spoilt, offsets, binary=binary, token_mask=mask), masked)
    nothing = torch.zeros(13, dtype=torch.bool)
    assert sparsity_loss(routing, offsets, binary=binary, token_mask=nothing) == 0


def test_sparsity_under_autocast(seed):
    routing, _, offsets = random_routing([6, 4, 4, 8, 2], 0, "binary")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sparsity_loss(routing, offsets, binary=True)
    torch.testing.assert_close(loss, sparsity_loss(routing, offsets, binary=True))


def stack_of(num_layers: int, **options) -> torch.nn.Sequential:
    """Layers whose scores spread over (0,1), with different means."""
    layers = []
    for index in range(num_layers):
        layer = DSMoEFFN(
            16, 64, 15, router_init="paper", router_bias=True, shared_size=4, **options
        )
        with torch.no_grad():
            layer.router.weight.normal_(std=0.5)
            layer.router.bias.fill_(index - 1.0)
        layers.append(layer)
    return torch.nn.Sequential(*layers).train()


@pytest.mark.parametrize("target", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("gates", ["scores", "binary"])
def test_threshold_controller_holds_the_target(target, gates, seed):
    """From both sides, per layer, the shared expert counted in."""
    layers = stack_of(3, gates=gates)
    controller = ThresholdController(layers, target, eta=0.2)
    x = torch.randn(400, 16)
    for _ in range(80):
        with torch.no_grad():
            for layer in layers:
                layer(x)
        controller.step()
    dsmoe_ext.active_fraction(layers)
    for layer in layers:
        layer(x)
    assert dsmoe_ext.active_fraction(layers).per_layer == pytest.approx([target] * 3, abs=0.02)
    assert len({layer.threshold.item() for layer in layers}) == 3


def test_threshold_controller_step(seed):
    """tau += eta (active - target), from training tokens alone, whatever is evaluated between."""
    (layer,) = stack_of(1)
    controller = ThresholdController(layer, 0.5, eta=0.1)
    mask = torch.arange(40) < 30
    layer(torch.randn(40, 16), token_mask=mask)
    share = dsmoe_ext.active_fraction(layer).mean  # another reader takes nothing away
    layer.eval()(torch.randn(1000, 16) + 3)
    controller.step()
    assert layer.threshold.item() == pytest.approx(0.5 + 0.1 * (share - 0.5))
    before = layer.threshold.clone()
    controller.step()  # nothing ran since
    assert torch.equal(layer.threshold, before)
    for _ in range(50):  # no wind-up beyond what a score can reach
        layer.train()(torch.randn(4, 16) + 100)
        controller.step()
    assert 0 <= layer.threshold.item() <= 1


def test_controller_follows_the_optimizer(seed):
    layers = stack_of(2)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
    handle = ThresholdController(layers, 0.1, eta=0.1).attach(optimizer)
    for _ in range(2):  # two micro-batches, one step
        layers(torch.randn(10, 16)).sum().backward()
    assert layers[0].threshold == 0.5
    optimizer.step()
    moved = layers[0].threshold.clone()
    assert moved != 0.5
    handle.remove()
    layers(torch.randn(10, 16))
    optimizer.step()
    assert torch.equal(layers[0].threshold, moved)


def test_controller_of_top_p(seed):
    layers = stack_of(1, method="top_p", threshold=0.5)
    controller = ThresholdController(layers, 0.6, eta=0.2)
    for _ in range(80):
        layers(torch.randn(200, 16))
        controller.step()
    dsmoe_ext.active_fraction(layers)
    layers(torch.randn(400, 16))
    assert dsmoe_ext.active_fraction(layers).mean == pytest.approx(0.6, abs=0.05)


def test_lambda_controller(seed):
    layers = stack_of(1, method="relu")
    options = {"sparsity_weight": 0.0}
    layers.config = type("Config", (), {"dsmoe": options})()
    controller = LambdaController(layers, 0.3, alpha=1.2, start=1e-8)
    layers[0].router.bias.data.fill_(9.0)
    layers(torch.randn(10, 16))
    controller.step()
    assert options["sparsity_weight"] == pytest.approx(1.2e-8)
    layers[0].router.bias.data.fill_(-9.0)
    for _ in range(2):
        layers(torch.randn(10, 16))
        controller.step()
    assert options["sparsity_weight"] == pytest.approx(1e-8 / 1.2)
    controller.step()
    assert options["sparsity_weight"] == pytest.approx(1e-8 / 1.2)


def test_controller_errors():
    with pytest.raises(ValueError, match="never moves it"):
        layers = stack_of(1, method="relu")
        layers.config = type("Config", (), {"dsmoe": {"sparsity_weight": 0.0}})()
        LambdaController(layers, 0.5)
    with pytest.raises(ValueError, match="target_active"):
        ThresholdController(stack_of(1), 0.0)
    with pytest.raises(ValueError, match="no threshold"):
        ThresholdController(stack_of(1, method="relu"), 0.5)
    with pytest.raises(ValueError, match="convert"):
        ThresholdController(torch.nn.Linear(2, 2), 0.5)
