"""Folders and names of version 0.1, which had a LLaMA of its own."""

from pathlib import Path

import pytest
import torch

import dsmoe_ext

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402

pytestmark = pytest.mark.quick

# Written by the version before (commit 6c3200c): 2 layers, a shared expert, unequal sizes,
# permutations, own thresholds and draw counters; beside it the logits of tokens 3 to 22.
FOLDER = Path(__file__).parent / "data" / "dsmoe_llama"


def test_old_folder_opens_bit_for_bit(tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is LlamaForCausalLM and model.config.model_type == "llama"
    ids = torch.arange(3, 23)[None]
    assert torch.equal(model(ids).logits, load_file(FOLDER / "logits.safetensors")["logits"])
    tensors = load_file(FOLDER / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    for index, layer in enumerate(model.model.layers):
        assert layer.mlp.draw_counter == index + 5 and layer.mlp.sizes == [4, 4, 2, 6]
    wanted = {"sparsity_weight": 0.3, "target_active": 0.6, "seed": 9, "sample_prob": 0.5}
    wanted |= {"ste": "sampled", "gates": "binary", "rescale": True, "expert_sizes": [4, 2, 6]}
    assert {name: model.config.dsmoe[name] for name in wanted} == wanted

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER)
    assert isinstance(classifier.model.layers[0].mlp, dsmoe_ext.DSMoEFFN)


def test_old_names(make_llama, tmp_path):
    model = dsmoe_ext.convert_llama(make_llama(), 4)
    assert isinstance(model, dsmoe_ext.DSMoELlamaForCausalLM)
    assert not isinstance(make_llama(), dsmoe_ext.DSMoELlamaForCausalLM)
    assert not isinstance(dsmoe_ext.merge_to_llama(model), dsmoe_ext.DSMoELlamaForCausalLM)
    old = dsmoe_ext.DSMoELlamaForCausalLM.from_pretrained(FOLDER)
    assert isinstance(old, dsmoe_ext.DSMoELlamaForCausalLM)
    fresh = dsmoe_ext.DSMoELlamaForCausalLM(old.config)
    fresh.load_state_dict(load_file(FOLDER / "model.safetensors"))
    ids = torch.arange(3, 23)[None]
    assert torch.equal(fresh.eval()(ids).logits, old(ids).logits)
    base = dsmoe_ext.DSMoELlamaModel.from_pretrained(FOLDER)
    assert isinstance(base, dsmoe_ext.DSMoELlamaModel)
    config = dsmoe_ext.DSMoELlamaConfig(num_attention_heads=4, num_experts=4, top_k=1)
    assert config.dsmoe == {"num_experts": 4, "top_k": 1} and config.model_type == "llama"
