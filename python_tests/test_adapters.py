"""PEFT on sparse models: adapters train, merge and save, and none is lost without a word."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.offline.compress import compress
from dsmoe_ext.offline.prune import prune
from dsmoe_ext.quantization.model import quantize
from dsmoe_ext.training.tiny import tiny_llama

peft = pytest.importorskip("peft")

IDS = torch.arange(32).view(2, 16) * 7 % 256
TEXT = torch.arange(24 * 64).view(24, 64) * 31 % 256


@pytest.fixture
def sparse():
    return dsmoe_ext.calibrate(tiny_llama(), TEXT, expert_size=8, progress=False).eval()


def loud(model):
    """Adapters that change the model from the start."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def test_lora_on_the_experts(sparse):
    """Same logits at first, gradients for every adapter, and merging keeps what was trained."""
    before = sparse(IDS).logits.detach()
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)
    model = peft.get_peft_model(sparse, config)
    torch.testing.assert_close(model.eval()(IDS).logits, before)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(adapters) == 2 * 4 and all(p.grad.any() for p in adapters)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0).step()
    trained = model.eval()(IDS).logits.detach()
    assert not torch.allclose(trained, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, trained, rtol=1e-4, atol=1e-4)


def test_modules_to_save(sparse, tmp_path):
    """Statistics, controllers and thresholds are those of the copies that PEFT trains."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    model = peft.get_peft_model(sparse, config).train()
    threshold = dsmoe_ext.ThresholdController(model, 0.4)
    weight = dsmoe_ext.LambdaController(model, 0.4, start=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    threshold.step()
    weight.step()
    seen = dsmoe_ext.active_fraction(model)
    assert len(seen.per_layer) == 2 and seen.num_tokens == IDS.numel()
    assert weight.options["sparsity_weight"] == pytest.approx(1.2e-3)
    used = [ffn.threshold.item() for ffn in threshold.ffns]
    logits = model.eval()(IDS).logits
    merged = model.merge_and_unload()
    assert [layer.mlp.threshold.item() for layer in merged.model.layers] == used
    merged.save_pretrained(tmp_path)
    again = dsmoe_ext.DSMoELlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["q_proj", "gate_proj", "down_proj", "lm_head"])
def test_adapters_are_kept_or_refused(target):
    """Converting a model with adapters in it keeps what they do, or says that they are there."""
    config = peft.LoraConfig(target_modules=[target])
    for change in (
        lambda model: dsmoe_ext.sparsify(model, 6),
        lambda model: dsmoe_ext.calibrate(
            model, TEXT, target_active=1.0, expert_size=8, progress=False
        ),
    ):
        dense = loud(peft.inject_adapter_in_model(config, tiny_llama(tie_word_embeddings=False)))
        want = dense(IDS).logits
        try:
            got = change(dense)(IDS).logits
        except (TypeError, ValueError) as error:
            assert any(word in str(error) for word in ("adapter", "LoRA", "PEFT")), error
        else:
            assert (got - want).norm() < 0.5 * want.norm()


def test_what_replaces_experts_says_that_adapters_are_there(sparse):
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
    peft.get_peft_model(sparse, peft.LoraConfig(target_modules=[], target_parameters=names))
    use = [torch.arange(float(ffn.num_experts)) for ffn in ffn_layers(sparse)]
    for change in (
        dsmoe_ext.merge,
        quantize,
        lambda m: compress(m, 2),
        lambda m: prune(m, use, 0.5),
    ):
        with pytest.raises(ValueError, match=r"has an adapter \(ParamWrapper\): merge it"):
            change(sparse)


def test_merging_keeps_adapters_elsewhere(sparse):
    model = loud(peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), sparse))
    dense = dsmoe_ext.merge(model)
    assert any("lora" in name for name, _ in dense.named_parameters())
