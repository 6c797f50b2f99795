"""Every family of models: sparse and back, on disk, generation, gradients, checkpointing."""

import copy

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.calibration.streams import Streams
from dsmoe_ext.layers import ffn_layers

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA = {"sliding_window": 32, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 32},
    "gemma": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {"partial_rotary_factor": 1.0},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0625,
        "logits_scaling": 8.0,
    },
    "cohere": {},
    "cohere2": {"sliding_window": 32},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "stablelm": {},
    "exaone4": {"sliding_window": 32},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "helium": {},
    "lfm2": {},
    "ministral3": {},
    "internlm3": {},
}


def tiny(kind: str, **changes):
    """A causal language model of the family whose logits depend on every MLP."""
    config = CONFIG_MAPPING[kind](**(COMMON | FAMILIES[kind] | changes))
    return larger(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@torch.no_grad()
def larger(model):
    """Weights of standard deviation 0.02 hardly matter beside the residual stream."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            parameter.mul_(4)
        elif parameter.dim() == 1 and "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


QUICK = ("qwen3", "phi3", "gemma2", "lfm2")
families = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.quick] if k in QUICK else []) for k in FAMILIES]
)


def batch():
    """Two texts of 12 tokens, the second padded on the left by 4."""
    ids = torch.randint(3, 96, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def route(model):
    """Random routers: about half of the pairs on."""
    for ffn in ffn_layers(model):
        ffn.router.weight.normal_(std=0.5)
        ffn.router.bias.normal_(std=0.5)
        ffn.set_threshold(0.4)
    return model


def assert_same_bits(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def gradients(model, given):
    model.zero_grad()
    model.train()(**given).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@families
def test_sparse_and_back(kind, tmp_path, seed):
    dense, given = tiny(kind), batch()
    original = copy.deepcopy(dense)
    inter = dense.config.intermediate_size if kind != "lfm2" else None
    sizes = [len(m) for m in _permutations(dense)]
    model = dsmoe_ext.sparsify(dense, 4, permutations=_permutations(dense), sparsity_weight=0.0)
    assert type(model) is type(original) and model.config.model_type == kind, (inter, sizes)
    want = original(**given)
    difference = (model(**given).logits - want.logits).abs().max()
    assert difference <= 1e-5, f"all experts on: logits differ by {difference:.1e}"

    # With every expert on, training is the dense model's.
    dense_gradients, ours = gradients(original, given), gradients(model, given)
    for name, gradient in dense_gradients.items():
        if ".mlp." not in name and ".feed_forward." not in name:
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (ours[name] - gradient).abs().max() <= 1e-4 * scale, name
    for module in (original, model):
        module.eval().zero_grad()

    merged = dsmoe_ext.merge(model)
    assert type(merged) is type(original)
    assert_same_bits(merged, original)
    assert merged.config.to_diff_dict() == original.config.to_diff_dict()

    route(model)
    before = model(**given).logits
    assert 0.05 < dsmoe_ext.active_fraction(model).mean < 1
    model.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "first", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for other in (loaded, again):
        assert_same_bits(other, model)
        assert torch.equal(other(**given).logits, before)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    tokens = model.generate(given["input_ids"][:1], **options)
    assert torch.equal(again.generate(given["input_ids"][:1], **options), tokens)


def _permutations(dense):
    from dsmoe_ext.gated_mlp import describe
    from dsmoe_ext.models.adopt import gated_mlps

    return [torch.randperm(describe(m).intermediate_size) for m in gated_mlps(dense).values()]


@families
def test_gradient_checkpointing(kind, seed):
    """The same bits in both modes, the sparsity loss and its statistics included."""
    model, given = route(dsmoe_ext.sparsify(tiny(kind), 4, sparsity_weight=2.0)), batch()
    model.config.use_cache = False
    want = gradients(model, given)
    assert ffn_layers(model)[0].router.weight.grad.abs().sum() > 0
    counted = dsmoe_ext.active_fraction(model)
    assert counted.num_tokens == given["attention_mask"].sum()
    for use_reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        got = gradients(model, given)
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert torch.equal(got[name], gradient), (use_reentrant, name)
        assert dsmoe_ext.active_fraction(model) == counted
        model.gradient_checkpointing_disable()


@families
def test_calibration(kind, seed):
    """The layers run again as the model runs them; the target is met; all on is the dense model."""
    dense, text = tiny(kind), torch.randint(3, 96, (6, 40))
    seen = []
    streams = Streams(dense, text)
    handle = streams.layers[-1].module.register_forward_hook(lambda *args: seen.append(args[-1]))
    dense(text)
    handle.remove()
    for layer in streams.layers:
        layer = streams.enter(layer)
        streams.leave(layer.mlp)
        assert streams.residual is not None
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    everything = slice(0, len(text))
    assert torch.equal(streams.dense.read(everything), last)
    torch.testing.assert_close(streams.sparse.read(everything), last, atol=1e-4, rtol=1e-4)

    options = dict(expert_size=8, progress=False)
    exact = dsmoe_ext.calibrate(dense, text, 1.0, refit=False, **options)
    torch.testing.assert_close(exact(text).logits, dense(text).logits, atol=1e-5, rtol=1e-5)
    assert_same_bits(dsmoe_ext.merge(exact), dense)
    half = dsmoe_ext.calibrate(dense, text, 0.5, **options)
    dsmoe_ext.active_fraction(half)
    half(text)
    assert abs(dsmoe_ext.active_fraction(half).mean - 0.5) <= 0.05


@families
def test_resume(kind, tmp_path, seed):
    """Two steps, saved, opened and two more are four steps: draws and thresholds come back."""
    given = batch()
    whole = route(dsmoe_ext.sparsify(tiny(kind), 4, ste="sampled"))
    parts = copy.deepcopy(whole)

    def steps(model, number):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = dsmoe_ext.ThresholdController(model.train(), 0.5)
        controller.attach(optimizer)
        for _ in range(number):
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(whole, 4)
    steps(parts, 2)
    parts.save_pretrained(tmp_path)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path)
    steps(resumed, 2)
    assert_same_bits(resumed, whole)
    assert ffn_layers(resumed)[0].draw_counter == 4
