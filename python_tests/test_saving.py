"""DSMoELlama on disk: the same bits back, plain LLaMA names and shapes, dtypes, shards, errors."""

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
    assert type(loaded) is dsmoe_ext.DSMoELlamaForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(loaded, model)
    ids = torch.randint(1, 67, (2, 9))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    for ours, theirs in zip(loaded.model.layers, model.model.layers, strict=True):
        for name in ("method", "gates", "rescale", "gate_scale", "ste", "sample_prob", "draw_key"):
            assert getattr(ours.mlp, name) == getattr(theirs.mlp, name), name
    for name in ("sparsity_weight", "target_active", "expert_sizes", "shared_size", "seed"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
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
    extra = {"expert_offsets", "permutation", "threshold", "draw_counter", "weight", "bias"}
    assert {name.rsplit(".", 1)[1] for name in shapes} == extra

    plain = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 67, (2, 9))
    torch.testing.assert_close(plain(ids).logits, merged.eval()(ids).logits)

    # The trap: a config.json that says "llama" must not skip the conversion.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    again = dsmoe_ext.DSMoELlamaForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(again, model)


def test_half_precision_loading(make_sparse, tmp_path, seed):
    model = make_sparse()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ffn = loaded.model.layers[0].mlp
    assert ffn.down_proj_t.dtype == torch.bfloat16
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


def test_missing_weights_are_an_error(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="convert_llama"):
        dsmoe_ext.DSMoELlamaForCausalLM.from_pretrained(tmp_path)
