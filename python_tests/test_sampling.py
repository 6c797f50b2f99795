"""Sampled STE: the draws themselves, and that the gradients they give are unbiased end to end."""

import pytest
import torch

from dsmoe_ext import DSMoEFFN
from dsmoe_ext.sampling import draw_weights, mix_key

pytestmark = pytest.mark.quick


def draw(key: int, position: int, num_tokens=500, num_experts=40, prob=0.25) -> torch.Tensor:
    return draw_weights(key, torch.tensor(position), num_tokens, num_experts, prob)


@pytest.mark.parametrize("prob", [0.01, 0.25, 0.5, 1.0])
def test_mean_and_values(prob):
    weights = draw(mix_key(1), 0, prob=prob)
    kept = weights != 0
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / prob))
    deviation = (prob * (1 - prob) / weights.numel()) ** 0.5
    assert abs(kept.float().mean() - prob) <= 4.5 * deviation


def test_splitmix_reference_values():
    """Against SplitMix64 in Python's integers, bit for bit."""

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden, key, position = 0x9E3779B97F4A7C15, mix_key(7, 3), 12
    start = mix(mix((position * golden + key) % 2**64))
    want = [(mix((start + i * golden) % 2**64) >> 40) < 2**22 for i in range(200)]
    assert draw(key, position, 20, 10).flatten().bool().tolist() == want


def test_independent_of_layer_step_and_seed():
    base = draw(mix_key(0, 0), 0) != 0
    others = [(mix_key(0, 1), 0), (mix_key(1, 0), 0), (mix_key(0, 0), 1), (mix_key(0, 0), 2**40)]
    for key, position in others:
        other = draw(key, position) != 0
        both = (base & other).float().mean().item()
        deviation = (0.0625 * 0.9375 / base.numel()) ** 0.5
        assert abs(both - 0.0625) <= 4.5 * deviation
    assert torch.equal(draw(mix_key(0, 0), 5), draw(mix_key(0, 0), 5))


def test_counter_moves_only_with_draws(seed):
    ffn = DSMoEFFN(8, 16, 4, ste="sampled", router_init="paper")
    x = torch.randn(5, 8)
    ffn(x)
    ffn(x)
    assert ffn.draw_counter == 2
    with torch.no_grad():
        ffn(x)
    ffn.eval()(x)
    ffn.train().router.requires_grad_(False)
    ffn(x)
    assert ffn.draw_counter == 2


class Stack(torch.nn.Module):
    """Three FFNs with residuals, as far as the router gradients of one reach into another."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(torch.nn.functional.rms_norm(x, x.shape[-1:]))
        return x


def make_stack(shared_draws: bool, seed: int = 11) -> Stack:
    generator = torch.Generator().manual_seed(5)
    layers = []
    for index in range(3):
        layer = DSMoEFFN(
            8, 16, 4, router_init="paper", router_bias=True, ste="exact", sample_prob=0.25,
            dtype=torch.float64,
        )  # fmt: skip
        layer.set_seed(seed, 0 if shared_draws else index)
        for parameter in layer.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * 0.7)
        layers.append(layer)
    return Stack(layers)


def z_scores(stack: Stack, num_calls: int) -> torch.Tensor:
    """How many standard errors the mean sampled gradient lies from the exact one, per element.

    Two copies of the tokens run at once, each with its own draws: one call gives a mean of two.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64).repeat(2, 1)
    dy = torch.randn(64, 8, generator=generator, dtype=torch.float64).repeat(2, 1)
    parameters = list(stack.parameters())

    def gradient() -> torch.Tensor:
        loss = (stack(x) * dy).sum() / 2
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    exact = gradient()
    for layer in stack.layers:
        layer.ste = "sampled"
    draws = torch.stack([gradient() for _ in range(num_calls)])
    noisy = draws.std(0) > 1e-12 * exact.abs().max()
    torch.testing.assert_close(draws[0][~noisy], exact[~noisy])
    assert noisy.sum() > 300  # routers of all layers, experts of the first two
    return ((draws.mean(0) - exact) / (draws.std(0) / num_calls**0.5))[noisy]


def test_unbiased_through_three_layers():
    z = z_scores(make_stack(shared_draws=False), 400)
    print(f"max |z| {z.abs().max():.2f}, mean z² {z.square().mean():.2f}")
    assert z.abs().max() <= 4.5
    assert 0.5 <= z.square().mean() <= 1.5


def test_shared_draws_would_be_biased():
    """The test above can fail: with one draw for all layers it does."""
    z = z_scores(make_stack(shared_draws=True), 400)
    assert z.abs().max() > 4.5
