"""calibrate() on tiny random LLaMAs."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import dsmoe_ext
from dsmoe_ext.calibration import layerwise, states, streams
from dsmoe_ext.layers import ffn_layers

pytestmark = pytest.mark.quick


def tiny_llama(intermediate_size=96, dtype=torch.float32, layers=2):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():  # gates that differ from token to token, as in a trained model
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(layer.mlp, name).weight
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    return model


def some_text(num_windows=12, length=64):
    return torch.randint(97, (num_windows, length))


def calibrate(model, text, **options):
    options = {"expert_size": 8, "progress": False, **options}
    return dsmoe_ext.calibrate(model, text, **options)


def logits(model, text):
    with torch.no_grad():
        return model(text[:2]).logits


def measured_active(model, text):
    dsmoe_ext.active_fraction(model)
    with torch.no_grad():
        model(text)
    return dsmoe_ext.active_fraction(model)


@pytest.mark.parametrize("target", [0.4, 0.5, 0.75, 1.0])
def test_reaches_the_target(target, seed):
    model, text = tiny_llama(), some_text(24)
    sparse = calibrate(model, text, target_active=target)
    active = measured_active(sparse, text)
    assert all(abs(share - target) <= 0.03 for share in active.per_layer), active
    ffn = ffn_layers(sparse)[0]
    assert ffn.shared_size == 24 and ffn.num_experts == 9 and ffn.gates == "binary"
    assert not ffn.router.options["rescale"] and sparse.config.dsmoe["target_active"] == target
    unseen = measured_active(sparse, some_text(24))
    assert abs(unseen.mean - target) <= 0.06


def test_the_shared_part_alone_is_a_pruned_model(seed):
    sparse = calibrate(tiny_llama(), some_text(24), target_active=0.5, shared=0.5)
    assert measured_active(sparse, some_text(8)).per_layer == [0.5, 0.5]


@pytest.mark.parametrize("size", [96, 100, 95])
@pytest.mark.parametrize("shared", [0.0, 0.25])
def test_sizes_that_do_not_divide(size, shared, seed):
    sparse = calibrate(tiny_llama(size), some_text(), shared=shared)
    active = measured_active(sparse, some_text(24))
    assert abs(active.mean - 0.5) <= 0.08
    for ffn in ffn_layers(sparse):
        assert ffn.permutation.sort().values.tolist() == list(range(size))


@pytest.mark.parametrize("method", ["threshold", "top_p", "top_k", "mean_score"])
@pytest.mark.parametrize(
    ("sizes", "shared", "want"),
    [
        ("pairs:5,1;4,2", 0.25, [30, 6, 24, 12]),
        ([24, 8, 16, 24], 0.25, [24, 8, 16, 24]),
        ([2.0, 1, 1], 0.0, [48, 24, 24]),
    ],
)
def test_unequal_experts(method, sizes, shared, want, seed):
    text = some_text(24)
    options = {"expert_sizes": sizes, "shared": shared, "method": method}
    sparse = calibrate(tiny_llama(), text, **options)
    ffn = ffn_layers(sparse)[0]
    assert ffn.expert_offsets.diff()[ffn.num_shared :].tolist() == want
    assert ffn.shared_size == round(96 * shared)
    if method in ("threshold", "top_p"):  # to top_k experts of any size count alike
        assert abs(measured_active(sparse, text).mean - 0.5) <= 0.05
    merged = dsmoe_ext.merge(calibrate(tiny_llama(), text, refit=False, **options))
    with torch.no_grad():
        assert merged(text[:2]).logits.isfinite().all()


def test_deterministic_and_leaves_the_model_alone(seed):
    model, text = tiny_llama(), some_text()
    before = copy.deepcopy(model.state_dict())
    precision = torch.backends.mkldnn.matmul.fp32_precision
    first = calibrate(model, text, seed=7).state_dict()
    torch.rand(3)
    second = calibrate(model, text, seed=7).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert torch.backends.mkldnn.matmul.fp32_precision == precision and not model.training


def test_autocast_does_not_matter(seed):
    model, text = tiny_llama(), some_text()
    want = calibrate(model, text).state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = calibrate(model, text).state_dict()
    assert all(torch.equal(value, got[name]) for name, value in want.items())


def test_without_refit_the_merge_is_exact(seed):
    model = tiny_llama()
    merged = dsmoe_ext.merge_to_llama(calibrate(model, some_text(), refit=False))
    for name, value in model.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name


def test_everything_on_is_the_dense_model(seed):
    """target_active 1 without refit: every gate is 1, so nothing may change."""
    model, text = tiny_llama(), some_text()
    sparse = calibrate(model, text, target_active=1.0, refit=False)
    assert measured_active(sparse, text).mean == 1.0
    torch.testing.assert_close(logits(sparse, text), logits(model, text))


def test_refit_reduces_every_layers_error(seed, monkeypatch):
    errors = {}
    fit_layer = layerwise.fit_layer

    def recorded(*args):
        fit = fit_layer(*args)
        errors.setdefault(args[5], []).append(fit.error)
        return fit

    monkeypatch.setattr(layerwise, "fit_layer", recorded)
    monkeypatch.setattr(layerwise, "CORRECTION", 0.0)
    model, text = tiny_llama(layers=3), some_text(24)
    distance = {
        refit: (logits(calibrate(model, text, refit=refit), text) - logits(model, text)).norm()
        for refit in (False, True)
    }
    assert len(errors[True]) == len(errors[False]) == 3
    assert all(new < old for new, old in zip(errors[True], errors[False], strict=True)), errors
    assert distance[True] < distance[False]


def layers_of(model, text):
    """The inputs [T,H] of every FFN, in float64."""
    seen = []
    hooks = [
        ffn.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1).double()))
        for ffn in ffn_layers(model)
    ]
    with torch.no_grad():
        model(text)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("method", ["top_k", "top_p", "mean_score"])
def test_other_routers(method, seed, tmp_path):
    """The first layer's router against its definition; the target is met; the model is saved."""
    model, text = tiny_llama(dtype=torch.float64), some_text(24)
    sparse = calibrate(model, text, target_active=0.5, method=method, refit=False)
    ffn, x = ffn_layers(sparse)[0], layers_of(sparse, text)[0]
    assert ffn.method == method and ffn.gates == "binary"
    assert abs(measured_active(sparse, text).mean - 0.5) < 0.02
    gate, up, down = (w.double() for w in ffn.expert_weights())
    ranges = [slice(*pair) for pair in pairwise(ffn.expert_offsets.tolist())][1:]
    if method == "mean_score":
        wanted = torch.stack([(x @ gate[rows].T).mean(1) for rows in ranges], 1)
        torch.testing.assert_close(ffn.router(x, gate), wanted)
    else:  # ridge regression of the log norms of the experts' contributions
        act = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs() * down.norm(dim=1)
        logs = torch.stack([act[:, rows].norm(dim=1) for rows in ranges], 1)
        logs = (logs + 1e-8 * logs.mean()).log()
        centred = x - x.mean(0)
        gram = centred.T @ centred
        ridge = 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
        weight = torch.linalg.solve(gram + ridge, centred.T @ (logs - logs.mean(0)))
        wanted = logs.mean(0) + (x - x.mean(0)) @ weight
        scale = {"top_k": 4.0, "top_p": 2.0}[method]
        torch.testing.assert_close(ffn.router(x), scale * wanted, rtol=1e-6, atol=1e-6)
    active = ffn.route(x).gates[:, 1:] != 0
    if method == "top_p":  # the largest shares of the energy, up to the mass t
        share = (2 * wanted).softmax(1).sort(dim=1, descending=True).values
        number = ((share.cumsum(1) - share) < ffn.threshold.double()).sum(1)
        assert (active.sum(1) != number).double().mean() < 0.01  # float32 at the edge
        assert len(set(number.tolist())) > 1
    else:
        number = torch.full((len(x),), ffn.router.top_k)
        assert torch.equal(active.sum(1), number)
    kept = wanted.where(active, torch.inf).min(1).values
    assert (wanted.where(~active, -torch.inf).max(1).values <= kept + 1e-9).all()

    better = calibrate(model, text, target_active=0.5, method=method)
    distance = [(logits(m, text) - logits(model, text)).norm() for m in (better, sparse)]
    assert distance[0] < distance[1]
    better.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, text), logits(better, text))


def test_method_that_calibration_does_not_know(seed):
    with pytest.raises(ValueError, match="calibration knows threshold, top_k, top_p, mean_score"):
        calibrate(tiny_llama(), some_text(), method="modse")


def test_the_chunks_do_not_decide(seed, monkeypatch):
    """The same text in chunks of one window gives the same model, to rounding."""
    model, text = tiny_llama(dtype=torch.float64), some_text(24)
    whole = calibrate(model, text)
    monkeypatch.setattr(streams, "CHUNK_TOKENS", 64)
    torch.testing.assert_close(logits(calibrate(model, text), text), logits(whole, text))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_in_files_give_the_same_bits(dtype, seed, monkeypatch):
    model, text = tiny_llama(dtype=dtype), some_text(24)
    monkeypatch.setattr(streams, "CHUNK_TOKENS", 7 * 64)
    in_memory = calibrate(model, text).state_dict()
    monkeypatch.setattr(states, "IN_MEMORY", 0)
    in_files = calibrate(model, text).state_dict()
    assert all(torch.equal(value, in_files[name]) for name, value in in_memory.items())


def test_no_room_for_the_states(monkeypatch):
    monkeypatch.setattr(states, "IN_MEMORY", 0)
    with pytest.raises(OSError, match="set TMPDIR to a folder with more"):
        states.States((2**40, 64, 32), torch.float32, torch.device("cpu"))


def test_save_and_load_give_the_same_bits(seed, tmp_path):
    text = some_text()
    sparse = calibrate(tiny_llama(), text)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(sparse)
    assert torch.equal(logits(sparse, text), logits(loaded, text))
    state = loaded.state_dict()
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_converted_model_calibrates_as_the_dense_one(seed):
    model, text = tiny_llama(), some_text()
    converted = dsmoe_ext.convert_llama(model, num_experts=4, ste="exact", sparsity_weight=0.3)
    again = calibrate(converted, text)
    assert again.config.dsmoe["ste"] == "exact" and again.config.dsmoe["sparsity_weight"] == 0.3
    assert torch.equal(logits(again, text), logits(calibrate(model, text), text))
    # A calibrated model can be calibrated anew, at another target.
    assert abs(measured_active(calibrate(again, text, target_active=0.7), text).mean - 0.7) <= 0.03


def test_flat_tokens_and_half_precision(seed):
    model, text = tiny_llama(dtype=torch.bfloat16), some_text()
    flat = torch.cat([text.flatten(), text[0, :5]])  # a remainder is left out
    sparse = calibrate(model, flat, window=64)
    assert sparse.dtype == torch.bfloat16
    assert torch.equal(logits(sparse, text), logits(calibrate(model, text.to(torch.uint16)), text))
    assert abs(measured_active(sparse, text).mean - 0.5) <= 0.03


def test_training_mode_is_kept(seed):
    assert calibrate(tiny_llama().train(), some_text()).training


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (torch.zeros(1, 16, dtype=torch.int64), {}, "too few to calibrate on"),
        (torch.zeros(4, 64), {}, "must be integers"),
        (torch.zeros(2, 4, 64, dtype=torch.int64), {}, "shape"),
        (torch.full((4, 64), 97), {}, "0 to 96, got 97"),
        (torch.zeros(4, 64).int(), {"window": 0}, "window must be at least 1"),
        (None, {"target_active": 0.2}, "counts the shared part"),
        (None, {"target_active": 1.1}, "1 at most"),
        (None, {"shared": 0.99}, "less than one expert"),
        (None, {"expert_size": 97}, "expert_size"),
        (None, {"expert_sizes": [64, 16]}, "sum to 80, but 72 neurons are routed"),
        (None, {"expert_sizes": "pairs:3,1;2,1"}, "must be equal"),
        (None, {"expert_sizes": [72], "shared": 1.5}, "shared must be at least 0"),
    ],
)
def test_clear_errors(text, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_llama(), some_text() if text is None else text, **options)


def test_not_a_model():
    with pytest.raises(TypeError, match="no transformers model"):
        calibrate(nn.Linear(2, 2), some_text())


@pytest.mark.quick
def test_more_experts_than_cuda_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    most = dsmoe_ext.build_info()["max_cuda_experts"]
    layerwise._warn_of_many_experts(most)
    with pytest.warns(UserWarning, match=f"{most + 1} experts a layer are more than the {most}"):
        layerwise._warn_of_many_experts(most + 1)
