"""causal_lm_loss is transformers' loss, divergence is its formula, whatever the pieces."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from dsmoe_ext import lm_loss
from dsmoe_ext.lm_loss import causal_lm_loss, divergence

pytestmark = pytest.mark.quick


def batch(dtype=torch.float32, num_ignored=3):
    logits = (3 * torch.randn(2, 7, 11)).to(dtype).requires_grad_()
    labels = torch.randint(11, (2, 7))
    labels.view(-1)[torch.randperm(14)[:num_ignored]] = -100
    return logits, labels


def with_gradient(function, logits, labels, **options):
    loss = function(logits=logits, labels=labels, vocab_size=11, **options)
    return loss, torch.autograd.grad(3 * loss, logits)[0]


@pytest.mark.parametrize("piece", [1, 22, 35, 2**22])
@pytest.mark.parametrize("num_items", [None, 9, torch.tensor(9)])
def test_same_as_transformers(piece, num_items, seed, monkeypatch):
    monkeypatch.setattr(lm_loss, "PIECE", piece)
    options = {"num_items_in_batch": num_items}
    got = with_gradient(causal_lm_loss, *batch(), **options)
    torch.manual_seed(seed)
    want = with_gradient(ForCausalLMLoss, *batch(), **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_logits_lose_nothing_but_the_gradients_rounding(dtype, seed, monkeypatch):
    monkeypatch.setattr(lm_loss, "PIECE", 33)
    logits, labels = batch(dtype)
    loss, gradient = with_gradient(causal_lm_loss, logits, labels)
    exact = logits.detach().double().requires_grad_()
    want, want_gradient = with_gradient(causal_lm_loss, exact, labels)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    bits = 7 if dtype == torch.bfloat16 else 10
    torch.testing.assert_close(gradient, want_gradient.to(dtype), rtol=2.0**-bits, atol=1e-7)


def test_gradcheck(seed, monkeypatch):
    monkeypatch.setattr(lm_loss, "PIECE", 22)
    logits, labels = batch(torch.float64)
    assert torch.autograd.gradcheck(lambda z: causal_lm_loss(z, labels, 11), logits)


def test_shifted_labels_and_other_index(seed):
    logits, labels = batch(num_ignored=0)
    want = F.cross_entropy(logits.view(-1, 11), labels.view(-1), ignore_index=4)
    got = causal_lm_loss(logits, None, 11, shift_labels=labels, ignore_index=4)
    torch.testing.assert_close(got, want)


def test_no_label_is_nan_and_teaches_nothing():
    """As in transformers: the loss is 0 / 0, its gradient zero."""
    logits, labels = batch(num_ignored=14)
    loss, gradient = with_gradient(causal_lm_loss, logits, labels)
    want, want_gradient = with_gradient(ForCausalLMLoss, logits, labels)
    assert loss.isnan() and want.isnan()
    assert not want_gradient.any() and torch.equal(gradient, want_gradient)
    summed, gradient = with_gradient(causal_lm_loss, logits, labels, num_items_in_batch=5)
    assert summed == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_torch_func(seed):
    logits, labels = batch()
    want = with_gradient(ForCausalLMLoss, logits, labels)[1] / 3
    got = torch.func.grad(lambda z: causal_lm_loss(z, labels, 11))(logits.detach())
    torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("piece", [1, 14, 2**22])
@pytest.mark.parametrize("num_items", [None, 10])
def test_divergence_is_what_it_says(piece, num_items, seed, monkeypatch):
    monkeypatch.setattr(lm_loss, "PIECE", piece)
    logits, wanted = torch.randn(2, 2, 5, 7, dtype=torch.float64).unbind(0)
    labels = torch.tensor([[1, 2, -100, 3, 4], [1, 1, 1, -100, -100]])
    rows = [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1)]  # the positions before a counted label
    logits.requires_grad_()
    p, q = (t.softmax(-1) for t in (wanted, logits))
    want = sum((p[at] * (p[at] / q[at]).log()).sum() for at in rows) / (num_items or len(rows))
    got = divergence(logits, wanted, labels, num_items)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, logits) for loss in (got, want)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_divergence_of_half_logits(dtype, seed):
    logits, labels = batch(dtype)
    wanted = torch.randn(2, 7, 11).to(dtype)
    loss = divergence(logits, wanted, labels)
    exact = logits.detach().double().requires_grad_()
    want = divergence(exact, wanted.double(), labels)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(*pair)[0] for pair in ((loss, logits), (want, exact))]
    eps = torch.finfo(dtype).eps  # rounded once as it is made, once as it is scaled
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=2 * eps, atol=eps * 2**-5)
    assert loss.dtype == torch.float32 and divergence(logits.detach(), wanted, labels) == loss


def test_divergence_without_a_label(seed):
    logits, labels = batch(num_ignored=14)
    loss = divergence(logits, torch.randn(2, 7, 11), labels)
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].eq(0).all()
