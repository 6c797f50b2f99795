"""Models whose weights lie elsewhere: on disk, on the meta device, in shards, in inference mode."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import load_sharded_checkpoint

import dsmoe_ext
from dsmoe_ext.training import measure
from dsmoe_ext.training.tiny import tiny_llama

accelerate = pytest.importorskip("accelerate")

IDS = torch.arange(32).view(2, 16) * 7 % 256
TEXT = torch.arange(24 * 64).view(24, 64) * 31 % 256
MAP = {
    "model.embed_tokens": "cpu",
    "lm_head": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
}
MAP |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


def untied():
    return tiny_llama(tie_word_embeddings=False)


def calibrated(**options):
    return dsmoe_ext.calibrate(untied(), TEXT, expert_size=8, progress=False, **options).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sparse model in a folder."""
    path = tmp_path_factory.mktemp("sparse")
    calibrated().save_pretrained(path)
    return path


@pytest.mark.parametrize("place", ["disk", "cpu", "device_map"])
@pytest.mark.parametrize("change", ["sparsify", "calibrate"])
def test_a_dense_model_that_is_offloaded(tmp_path, place, change):
    """The right logits, or a refusal that says why."""
    want = untied()(IDS).logits
    if place == "device_map":
        untied().save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", device_map=MAP, offload_folder=tmp_path / "offload"
        )
    elif place == "disk":
        accelerate.disk_offload(model := untied(), tmp_path / "offload")
    else:
        accelerate.cpu_offload(model := untied(), torch.device("cpu"))
    try:
        if change == "sparsify":
            got = dsmoe_ext.sparsify(model, 6)(IDS).logits
        else:
            options = {"target_active": 1.0, "expert_size": 8, "progress": False}
            got = dsmoe_ext.calibrate(model, TEXT, **options)(IDS).logits
    except (TypeError, ValueError, RuntimeError) as error:
        assert "offload" in str(error)
    else:
        assert (got - want).norm() < (1e-4 if change == "sparsify" else 0.5) * want.norm()


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("use", ["loss", "train", "set_threshold", "generate"])
def test_a_sparse_model_that_is_offloaded(folder, tmp_path, buffers, use):
    """The numbers of the same model in memory, or a refusal that says why."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAP, offload_folder=tmp_path, offload_buffers=buffers
    )
    plain = AutoModelForCausalLM.from_pretrained(folder)
    try:
        if use == "loss":
            got, want = (m(input_ids=IDS, labels=IDS).loss for m in (model, plain))
        elif use == "train":
            got, want = (m.train()(input_ids=IDS, labels=IDS).loss for m in (model, plain))
        elif use == "generate":
            got, want = (m.generate(IDS[:1, :5], max_new_tokens=3) for m in (model, plain))
        else:
            dsmoe_ext.set_threshold(model, 0.9)
            dsmoe_ext.set_threshold(plain, 0.9)
            with torch.no_grad():
                got, want = model(IDS).logits, plain(IDS).logits
    except (TypeError, ValueError, RuntimeError) as error:
        assert "offload" in str(error), error
    else:
        torch.testing.assert_close(got, want)


def test_shards_come_one_by_one(tmp_path):
    model = calibrated()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    want = model(IDS).logits
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for files, start in ((shards, model), (shards[::-1], model), (shards, None)):
        other = AutoModelForCausalLM.from_config(model.config) if start is None else start
        other = copy.deepcopy(other).eval()
        for file in files:
            other.load_state_dict(load_file(file), strict=False)
        torch.testing.assert_close(other(IDS).logits, want)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    load_sharded_checkpoint(other, str(tmp_path), strict=False)
    torch.testing.assert_close(other(IDS).logits, want)


@pytest.mark.parametrize("start", ["apply", "init_weights", "reset_parameters"])
def test_buffers_after_the_meta_device(start):
    """Whatever memory held: offsets, thresholds, counters and permutations are set again."""
    config = dsmoe_ext.sparsify(tiny_llama(), 6, threshold=0.4).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(77)
    if start == "apply":
        model.apply(model._init_weights)
    elif start == "init_weights":
        model.init_weights()
    for ffn in (layer.mlp for layer in model.model.layers):
        if start == "reset_parameters":
            ffn.reset_parameters()
        assert ffn.expert_offsets.tolist() == list(range(0, 97, 16))
        assert ffn.threshold.item() == pytest.approx(0.4) and ffn.draw_counter.item() == 0
        assert ffn.permutation.tolist() == list(range(96))
    if start != "reset_parameters":
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("made", ["calibrated", "converted"])
def test_made_in_inference_mode(tmp_path, made):
    """Everything that changes a buffer works afterwards, outside of it."""
    with torch.inference_mode():
        model = calibrated() if made == "calibrated" else dsmoe_ext.sparsify(untied(), 6)
    dsmoe_ext.set_threshold(model, 0.3)
    with measure.threshold(model, 0.7), torch.no_grad():
        model(IDS)
    assert model.model.layers[0].mlp.threshold.item() == pytest.approx(0.3)
    model.model.layers[0].mlp.next_draw()
    dsmoe_ext.ThresholdController(model, 0.3).step()
    with torch.no_grad():
        model.eval().pack()
        model(IDS)
    model.save_pretrained(tmp_path)
