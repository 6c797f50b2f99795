"""Sparse models on disk: the same bits back, the dense names and shapes, dtypes, shards."""

import json

import pytest
import torch

import dsmoe_ext

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402

pytestmark = pytest.mark.quick


def assert_same_bits(ours, theirs) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(make_sparse, tmp_path, tied, seed):
    """The same bits: sizes, gate mode, rescale, thresholds, permutations, shared part, draws."""
    permutations = [torch.randperm(48) for _ in range(3)]
    model = make_sparse(
        llama={"tie_word_embeddings": tied}, permutations=permutations, expert_sizes=[20, 8, 12],
        shared_size=8, threshold=0.45, gates="binary", rescale=True, ste="sampled", sample_prob=0.5,
        sparsity_weight=0.3, target_active=0.6, seed=9,
    )  # fmt: skip
    for index, layer in enumerate(model.model.layers):
        layer.mlp.threshold.fill_(0.4 + index / 31)
        layer.mlp.draw_counter.fill_(index + 5)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(loaded, model)
    ids = torch.randint(1, 67, (2, 9))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    for ours, theirs in zip(loaded.model.layers, model.model.layers, strict=True):
        for name in ("method", "gates", "ste", "sample_prob", "draw_key"):
            assert getattr(ours.mlp, name) == getattr(theirs.mlp, name), name
        assert ours.mlp.router.rule_options == theirs.mlp.router.rule_options
    for name in ("sparsity_weight", "target_active", "expert_sizes", "shared_size", "seed"):
        assert loaded.config.dsmoe[name] == model.config.dsmoe[name], name
    assert dsmoe_ext.active_fraction(loaded).mean == dsmoe_ext.active_fraction(model).mean

    loaded.save_pretrained(tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_names_and_shapes_on_disk(make_sparse, tmp_path, seed):
    from safetensors import safe_open

    model = make_sparse(permutations=[torch.randperm(48) for _ in range(3)])
    merged = dsmoe_ext.merge_to_llama(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, weight in merged.state_dict().items():
        assert shapes.pop(name) == tuple(weight.shape)
    extra = {"permutation", "threshold", "draw_counter", "weight", "bias"}
    assert {name.rsplit(".", 1)[1] for name in shapes} == extra

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    del config["dsmoe"]  # as for a program that does not know us
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 67, (2, 9))
    torch.testing.assert_close(plain(ids).logits, merged.eval()(ids).logits)


def test_half_precision_loading(make_sparse, tmp_path, seed):
    model = make_sparse()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ffn = loaded.model.layers[0].mlp
    assert ffn.down_proj.weight.dtype == torch.bfloat16
    assert torch.equal(ffn.router.weight, model.model.layers[0].mlp.router.weight)
    assert loaded.generate(torch.ones(1, 3).long(), max_new_tokens=3, min_new_tokens=3).shape == (
        1,
        6,
    )


def test_base_model_and_sharded_folder(make_sparse, tmp_path, seed):
    model = make_sparse()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(loaded, model)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert_same_bits(base, model.model)


def test_dense_folder_opened_as_sparse(make_llama, tmp_path, seed):
    """What the folder lacks is made: routers that leave everything on, buffers from the options."""
    llama = make_llama()
    llama.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.dsmoe = {"num_experts": 6, "threshold": 0.3}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    ids = torch.randint(1, 67, (2, 9))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)
    ffn = model.model.layers[1].mlp
    assert ffn.threshold == torch.tensor(0.3) and ffn.draw_counter == 0
    assert ffn.permutation.tolist() == list(range(48))
