"""sample_text: text that the model draws from itself."""

import pytest
import torch

from dsmoe_ext.calibration import own_text
from dsmoe_ext.calibration.own_text import sample_text
from dsmoe_ext.training.tiny import tiny_llama

pytestmark = pytest.mark.quick


def test_same_seed_same_text_and_the_model_stays_as_it_was(seed, monkeypatch):
    monkeypatch.setattr(own_text, "BATCH_ROWS", 4)
    model = tiny_llama().train()
    done = []
    first = sample_text(model, 10, 12, seed=3, advance=done.append)
    torch.rand(2)
    assert torch.equal(first, sample_text(model, 10, 12, seed=3))
    assert not torch.equal(first, sample_text(model, 10, 12, seed=4))
    assert first.shape == (10, 12) and first.dtype == torch.int64 and model.training
    assert not first.is_inference() and sum(done) == 10 * 11
    assert len(set(first[:, 1].tolist())) > 1


def test_half_of_the_rows_begin_like_documents():
    model = tiny_llama()
    first = sample_text(model, 64, 2)[:, 0]
    assert (first == model.config.bos_token_id).sum() >= 32
    model.config.bos_token_id = None
    assert len(set(sample_text(model, 64, 2)[:, 0].tolist())) > 16


def test_draws_follow_the_probabilities(seed):
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).expand(20000, 4)
    drawn = own_text._draw(logits, torch.Generator().manual_seed(seed))
    share = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.015, rtol=0)


def test_the_caches_memory_is_taken_once():
    model, layer = tiny_llama(), own_text._RoomForAll(9)
    states = torch.randn(2, 2, 3, 9, 4)  # keys and values of 2 rows, 3 heads, 9 tokens
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        kept = layer.update(*states[..., start:stop, :])
        assert all(map(torch.equal, kept, states[..., :stop, :]))
        assert layer.get_seq_length() == stop
    assert layer.keys.untyped_storage().nbytes() == states[0].nbytes
    assert model.config.num_hidden_layers == len(own_text._cache_for(model, 9).layers)


def test_cold_text_is_the_likeliest():
    """Towards temperature 0 every step takes the largest logit, and the cache changes nothing."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    text = sample_text(model, 3, 8, temperature=1e-4)
    with torch.no_grad():
        logits = model(text).logits
    assert torch.equal(logits[:, :-1].argmax(-1), text[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "above 0"),
        ({"length": 1}, "no text"),
        ({"num_windows": 0}, "no text"),
    ],
)
def test_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        sample_text(tiny_llama(), **{"num_windows": 2, "length": 4} | options)
