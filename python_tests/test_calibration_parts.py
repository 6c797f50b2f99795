"""The parts of calibration on plain tensors: sums, router, thresholds, refit, groups."""

import pytest
import torch

from dsmoe_ext.calibration.neurons import (
    Layout,
    expert_norms,
    experts_of_neurons,
    group_neurons,
    switch_off,
)
from dsmoe_ext.calibration.refit import refit_down_proj
from dsmoe_ext.calibration.router import (
    cholesky_solve,
    count_strength,
    fit_router,
    log_strength,
    ridge_cholesky,
    strength_histogram,
)
from dsmoe_ext.calibration.sums import Histogram, Moments

pytestmark = pytest.mark.quick


def moments(x, y, *, chunk=50, centred=True):
    """Moments of x [T,m], y [T,n], fed in chunks."""
    sums = Moments(centred=centred)
    for rows in torch.arange(len(x)).split(chunk):
        sums.add(x[rows], y[rows])
    return sums


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_moments_do_not_depend_on_the_chunks(chunk, seed, monkeypatch):
    monkeypatch.setattr(Moments, "ROWS", 2)
    x = torch.randn(200, 5, dtype=torch.float64) + 3
    y = torch.randn(200, 3, dtype=torch.float64) - 2
    sums = moments(x, y, chunk=chunk)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    torch.testing.assert_close(sums.mean_x, x.mean(0))
    torch.testing.assert_close(sums.mean_y, y.mean(0))
    torch.testing.assert_close(sums.gram, centred_x.T @ centred_x)
    torch.testing.assert_close(sums.moment, centred_x.T @ centred_y)
    raw = moments(x, y, chunk=chunk, centred=False)
    torch.testing.assert_close(raw.gram, x.T @ x)
    raw.gram.zero_()  # a copy
    torch.testing.assert_close(raw.take_gram(), x.T @ x)
    torch.testing.assert_close(sums.take_gram(), centred_x.T @ centred_x)
    with pytest.raises(AttributeError):
        raw.take_gram()
    torch.testing.assert_close(raw.moment, x.T @ y)
    torch.testing.assert_close(raw.power_y, y.square().sum(0))


def test_moments_far_from_zero_lose_nothing(seed):
    """float32 around a mean of 1000: the chunks' own shift keeps every digit of the spread."""
    spread = torch.randn(400, 4)
    sums = moments(spread + 1000, spread)
    exact = moments((spread + 1000).double(), spread.double())
    torch.testing.assert_close(sums.gram, exact.gram, rtol=1e-5, atol=1e-3)


def test_router_recovers_a_linear_strength(seed):
    """Norms that are exp of a linear function of x are predicted nearly exactly."""
    x = torch.randn(400, 16) * torch.linspace(0.5, 2, 16) + 1
    weight, bias = 0.3 * torch.randn(5, 16), torch.randn(5)
    strength = x @ weight.T + bias
    predicted = fit_router(moments(x, log_strength(strength.exp()))).of(x)
    explained = 1 - (predicted - strength).var() / strength.var()
    assert explained > 0.98


def test_router_survives_silent_experts(seed):
    x = torch.randn(100, 8)
    norms = torch.rand(100, 3)
    norms[:, 1] = 0
    for inputs, outputs in ((x, norms), (0 * x, torch.zeros(100, 3))):
        sums = moments(inputs, log_strength(outputs))
        found = fit_router(sums)
        assert found.weight.isfinite().all() and found.bias.isfinite().all()
        histogram = strength_histogram(found, sums)
        count_strength(histogram, found.of(inputs), [1, 1, 1])
        assert histogram.counts.sum() == 300


@pytest.mark.parametrize("sizes", [[4, 4, 4], [2, 5, 9]])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_threshold_from_a_histogram(sizes, share, seed):
    strength = torch.randn(500, 3)
    histogram = Histogram(-8, 8)
    for part in strength.split(64):
        count_strength(histogram, part, sizes)
    on = strength > histogram.value_above_which(share)
    active = (on.double().mean(dim=0) * torch.tensor(sizes)).sum() / sum(sizes)
    assert abs(active - share) <= 1e-2


def test_ridge_cholesky_makes_no_second_matrix(seed):
    """Of a wide FFN it would be a gigabyte."""
    rows, rhs = torch.randn(40, 7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    gram = rows.T @ rows
    system = gram + 0.1 * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    factor, added = ridge_cholesky(gram, 0.1)
    assert factor.data_ptr() == gram.data_ptr()
    assert added == pytest.approx((system - rows.T @ rows)[0, 0].item())
    torch.testing.assert_close(factor, torch.linalg.cholesky(system))
    torch.testing.assert_close(cholesky_solve(factor, rhs), torch.linalg.solve(system, rhs))


@pytest.mark.parametrize("columns", [1, 3, 512])
def test_refit_against_lstsq(columns, seed, monkeypatch):
    """Equal to the ridge regression written as one augmented least-squares problem."""
    masked = torch.randn(60, 10, dtype=torch.float64) * (torch.rand(60, 10) < 0.6)
    wanted, weight = torch.randn(60, 4, dtype=torch.float64), torch.randn(10, 4).double()
    monkeypatch.setattr("dsmoe_ext.calibration.refit.COLUMNS", columns)
    found, error = refit_down_proj(moments(masked, wanted, centred=False), weight, ridge=0.2)
    penalty = (0.2 * (masked.T @ masked).diagonal().mean()).sqrt()
    rows = torch.cat([masked, penalty * torch.eye(10, dtype=torch.float64)])
    targets = torch.cat([wanted, penalty * weight])
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, targets).solution)
    left = (masked @ found - wanted).square().sum() / wanted.square().sum()
    assert error == pytest.approx(left.item())


@pytest.mark.parametrize("sizes", [[4, 4], [5, 3]])
def test_groups_and_masks(sizes, seed):
    layout = Layout(2, sizes)
    x = torch.randn(200, 6)
    contributions = torch.rand(200, 10)
    contributions[:, [3, 8]] += 5
    order = group_neurons(moments(x, contributions), layout, seed=0)
    assert order[:2].tolist() == [3, 8]  # the strongest are shared
    assert order.sort().values.tolist() == list(range(10))
    experts = experts_of_neurons(order, layout)
    assert experts[order].tolist() == [2, 2] + [0] * sizes[0] + [1] * sizes[1]
    norms = expert_norms(contributions / 3, torch.full((10,), 3.0), experts, layout)
    for index, neurons in enumerate(order[2:].split(sizes)):
        torch.testing.assert_close(norms[:, index], contributions[:, neurons].norm(dim=1))
    on = torch.rand(200, 2) < 0.5
    masked = contributions.clone()
    switch_off(masked, on, experts)
    assert torch.equal(masked[:, order[:2]], contributions[:, order[:2]])
    for index, neurons in enumerate(order[2:].split(sizes)):
        expected = contributions[:, neurons] * on[:, index : index + 1]
        assert torch.equal(masked[:, neurons], expected)
