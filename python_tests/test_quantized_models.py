"""Models with experts of 8 and 4 bits: saved, loaded, packed, trained past their codes."""

import gc

import pytest
import torch
from torch import nn

import dsmoe_ext
from dsmoe_ext.quantization.model import quantize

FORMATS = {
    "8": {"bits": 8},
    "4": {"bits": 4},
    "4, symmetric": {"bits": 4, "symmetric": True},
}


@pytest.mark.parametrize("form", ["8", "4", "4, symmetric"])
def test_model_saved_and_loaded(form, make_llama, tmp_path):
    """Codes and nothing else come back; packed logits are those of the dequantized experts."""
    form = FORMATS[form]
    from transformers import AutoModelForCausalLM

    ids = torch.randint(1, 67, (2, 24))
    sparse = dsmoe_ext.sparsify(make_llama(), num_experts=4).eval()
    sparse.save_pretrained(tmp_path / "whole")
    quantize(sparse, **form, token_ids=ids)
    with torch.no_grad():
        want = sparse(ids).logits
    sparse.save_pretrained(tmp_path / "codes")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    assert loaded.config.dsmoe["quantization"]["bits"] == form["bits"]
    for name, tensor in sparse.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.pack()
    with torch.no_grad():
        got = loaded(ids).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.raises(RuntimeError, match="load the model again"):
        loaded.save_pretrained(tmp_path / "again")
    assert f"bits={form['bits']}" in repr(loaded)


def tensor_bytes():
    """Of all tensors that are alive, each storage once."""
    gc.collect()
    alive = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(storages.values())


@pytest.mark.parametrize("form", ["8", "4, symmetric"])
def test_packed_model_is_as_large_as_its_file(form, make_llama, tmp_path):
    """No copy in bf16, and none of the codes, stays beside those that the kernels read."""
    from transformers import AutoModelForCausalLM

    wide = make_llama(hidden_size=128, intermediate_size=2048).to(torch.bfloat16)
    quantize(dsmoe_ext.sparsify(wide, num_experts=16), **FORMATS[form]).save_pretrained(tmp_path)
    del wide
    before = tensor_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").pack()
    with torch.no_grad():
        loaded(torch.ones(1, 40, dtype=torch.long))
    file = (tmp_path / "model.safetensors").stat().st_size
    assert tensor_bytes() - before <= 1.1 * file


def test_model_trains_past_codes(make_llama):
    sparse = quantize(dsmoe_ext.sparsify(make_llama(), num_experts=4, ste="exact"), 8)
    ids = torch.randint(1, 67, (2, 16))
    sparse.train()
    sparse(ids, labels=ids).loss.backward()
    ffn = sparse.model.layers[0].mlp
    assert ffn.router.weight.grad.abs().sum() > 0
    assert sparse.model.embed_tokens.weight.grad.abs().sum() > 0
    assert not list(ffn.experts.parameters())


def test_model_pack_with_bits(make_llama):
    sparse = dsmoe_ext.sparsify(make_llama(), num_experts=4).eval()
    ids = torch.randint(1, 67, (1, 5))
    with torch.no_grad():
        want = sparse(ids).logits
        got = sparse.pack(bits=8) and sparse(ids).logits
    assert (got - want).norm() < 0.05 * want.norm()
    assert "packed=8 bits" in repr(sparse)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize(sparse, 8), 8)
