"""A converted LLaMA end to end on the CUDA kernels: see end_to_end.py."""

import copy

import pytest
import torch
from end_to_end import check, cuda

import dsmoe_ext

DTYPES = [torch.float32, torch.bfloat16]
SHAPE = {"num_hidden_layers": 2}


def batch(device):
    """Two texts, one padded on the right; padding has no label."""
    ids = torch.randint(1, 67, (2, 12), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 9:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    given = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in given.items()}


@pytest.fixture
def make_model(make_sparse):
    """With mixed masks that a rounding of the hidden states leaves alone."""

    def make(dtype, **options):
        torch.manual_seed(3)
        model = make_sparse(llama=SHAPE, **options)
        return model.to(dtype)

    return make


def counts(model):
    return torch.stack([layer.mlp.activity.totals() for layer in model.model.layers])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(make_model, dtype):
    @torch.no_grad()
    def run(model, device):
        out = model(**batch(device))
        return {"logits": out.logits, "loss": out.loss, "counts": counts(model)}

    check(run, make_model(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ste", ["exact", "sampled"])
def test_gradients(make_model, ste, dtype):
    def run(model, device):
        out = model.train()(**batch(device))
        out.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        return found | {"loss": out.loss.detach(), "counts": counts(model)}

    check(run, make_model(dtype, ste=ste, shared_size=16, sparsity_weight=0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_training_lowers_the_loss(make_model, dtype):
    model = make_model(dtype, ste="exact")
    with cuda() as device:
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        given, losses = batch(device), []
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(**given).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_tokens(make_model, dtype):
    """A prompt of 24 tokens, then one a sequence and step with the cache."""

    def generate(model, device):
        given = batch(device)
        given.pop("labels")
        return model.generate(**given, max_new_tokens=4, do_sample=False).cpu()

    model = make_model(dtype)
    expected = generate(copy.deepcopy(model), "cpu")
    with cuda() as device:
        assert torch.equal(generate(model.to(device), device), expected)
    assert expected.shape == (2, 16)


def test_saved_and_loaded(make_model, tmp_path):
    """The folder that a model on CUDA wrote gives the same logits on CUDA, bit for bit."""

    def load(name):
        return dsmoe_ext.DSMoELlamaForCausalLM.from_pretrained(tmp_path / name, dtype="bfloat16")

    make_model(torch.bfloat16, shared_size=16).save_pretrained(tmp_path / "from cpu")
    with cuda() as device, torch.no_grad():
        model = load("from cpu").to(device)
        model.save_pretrained(tmp_path / "from cuda")
        again = load("from cuda").to(device)
        assert torch.equal(again(**batch(device)).logits, model(**batch(device)).logits)
