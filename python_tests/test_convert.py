"""Conversion: the same function at the start, the same bits after merging, and clear errors."""

import copy

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.layout import expert_layout

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.quick

LAYOUTS = {
    "default": {},
    "fine": {"num_experts": 16},
    "one": {"num_experts": 1},
    "shared": {"num_experts": 5, "shared_size": 8},
    "unequal": {"expert_sizes": [30, 10, 8]},
    "binary": {"gates": "binary"},
    "relu": {"method": "relu"},
    "top_p": {"method": "top_p", "threshold": 1.0},
    "top_k": {"method": "top_k", "top_k": 8},
    "low threshold": {"threshold": 0.2},
}


def assert_equal_weights(model, other) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) and weight.dtype == theirs[name].dtype, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("permuted", [False, True])
def test_dense_start_and_merge(layout, permuted, make_llama, seed):
    llama = make_llama()
    original = copy.deepcopy(llama)
    permutations = [torch.randperm(48) for _ in range(3)] if permuted else None
    model = dsmoe_ext.convert_llama(llama, permutations=permutations, **LAYOUTS[layout])
    ids = torch.randint(1, 67, (2, 30))
    difference = (model(ids).logits - original(ids).logits).abs().max().item()
    print(f"max |logit difference| {difference:.1e}")
    assert difference <= 2e-5  # the issue allows 1e-3
    assert model.training == original.training
    assert_equal_weights(dsmoe_ext.merge_to_llama(model), original)
    assert_equal_weights(llama, original)  # the dense model is still itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, make_llama, seed):
    llama = make_llama().to(dtype)
    model = dsmoe_ext.convert_llama(llama, 6)
    ids = torch.randint(1, 67, (2, 30))
    exact = copy.deepcopy(llama).double()(ids).logits
    error, dense_error = ((m(ids).logits - exact).abs().max().item() for m in (model, llama))
    assert error <= 2 * dense_error + torch.finfo(dtype).eps * exact.abs().max()
    assert_equal_weights(dsmoe_ext.merge_to_llama(model), llama)


def test_folder(make_llama, tmp_path, seed):
    llama = make_llama(tie_word_embeddings=True)
    llama.generation_config.max_new_tokens = 7
    llama.config.rope_interleaved = False  # what some folders hold beside the known fields
    llama.save_pretrained(tmp_path / "dense")
    model = dsmoe_ext.convert_llama(tmp_path / "dense", 4, shared_size=8)
    ids = torch.randint(1, 67, (2, 30))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.max_new_tokens == 7

    merged = dsmoe_ext.merge_to_llama(model)
    merged.save_pretrained(tmp_path / "merged")
    files = [tmp_path / name / "model.safetensors" for name in ("dense", "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()
    config = merged.config.to_diff_dict()
    assert config == llama.config.to_diff_dict() and "dsmoe" not in config


def test_merge_after_training(make_llama, seed):
    """Whatever the weights became, merging gives the dense function with every gate at 1."""
    permutations = [torch.randperm(48) for _ in range(3)]
    model = dsmoe_ext.convert_llama(make_llama(), 4, permutations=permutations, ste="exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(1, 67, (4, 12))
    for _ in range(3):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = dsmoe_ext.merge_to_llama(model.eval())
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.router.weight)
        torch.nn.init.constant_(layer.mlp.router.bias, layer.mlp.router.start_logit)
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_shares_weights_and_nothing_else(make_llama):
    llama = make_llama()
    model = dsmoe_ext.convert_llama(llama)
    ours, theirs = model.model.layers[0], llama.model.layers[0]
    assert ours.mlp.gate_proj.weight is theirs.mlp.gate_proj.weight
    assert ours.self_attn.q_proj.weight is theirs.self_attn.q_proj.weight
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert len({layer.mlp.draw_key for layer in model.model.layers}) == 3
    model.set_attn_implementation("eager")
    assert ours.self_attn.config._attn_implementation == "eager"
    assert theirs.self_attn.config._attn_implementation == "sdpa"
    merged = dsmoe_ext.merge_to_llama(model)
    assert merged.model.layers[0].self_attn.config is merged.config
    assert not any(p.is_meta for p in [*merged.parameters(), *merged.buffers()])


def test_frozen_weights_stay_frozen(make_llama):
    llama = make_llama().requires_grad_(False)
    model = dsmoe_ext.convert_llama(llama)
    trainable = {name.split("mlp.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"router.weight", "router.bias"}
    assert not any(p.requires_grad for p in dsmoe_ext.merge_to_llama(model).parameters())


def test_quantization_config_is_dropped(make_llama, tmp_path):
    """What loading GGUF leaves in the config keeps a model from being saved."""
    llama = make_llama()
    llama.config.quantization_config = {"quant_method": "gguf"}
    model = dsmoe_ext.convert_llama(llama)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)


def test_errors(make_llama, tmp_path):
    llama = make_llama()
    with pytest.raises(ValueError, match="num_experts = 7 does not divide"):
        dsmoe_ext.convert_llama(llama, 7)
    with pytest.raises(TypeError, match="expert_count"):
        dsmoe_ext.convert_llama(llama, expert_count=4)
    with pytest.raises(ValueError, match="2 entries for 3 layers"):
        dsmoe_ext.convert_llama(llama, permutations=[torch.arange(48)] * 2)
    with pytest.raises(ValueError, match="once"):
        dsmoe_ext.convert_llama(llama, permutations=[torch.zeros(48)] * 3)
    with pytest.raises(ValueError, match="mlp_bias"):
        dsmoe_ext.convert_llama(make_llama(mlp_bias=True))
    with pytest.raises(ValueError, match="SiLU"):
        dsmoe_ext.convert_llama(make_llama(hidden_act="relu"))
    with pytest.raises(TypeError, match="no transformers model"):
        dsmoe_ext.convert_llama(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="already sparse"):
        dsmoe_ext.convert_llama(dsmoe_ext.convert_llama(llama))
    with pytest.raises(TypeError, match="nothing to merge"):
        dsmoe_ext.merge_to_llama(llama)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        dsmoe_ext.convert_llama(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        dsmoe_ext.convert_llama(tmp_path / "nowhere")
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no gated MLP"):
        dsmoe_ext.convert_llama(gpt)


def test_layout():
    assert expert_layout(48) == [6] * 8
    assert expert_layout(48, 5, shared_size=8) == [8] * 6
    assert expert_layout(48, expert_sizes=[40, 8]) == [40, 8]
    assert expert_layout(100, expert_sizes=[1.0, 1.0, 1.0]) == [33, 34, 33]
    ratios = [4.5, 0.5, 4.0, 1.0, 3.0, 2.0, 2.5, 2.5]  # MoDSE's pairs
    assert expert_layout(800, expert_sizes=ratios) == [180, 20, 160, 40, 120, 80, 100, 100]
