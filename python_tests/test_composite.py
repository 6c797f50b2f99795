"""Vision-language models, classifiers, and other ways in which a model reaches its layers."""

import copy
import pickle

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.layers import ffn_layers

transformers = pytest.importorskip("transformers")

TEXT = dict(
    vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
VISION |= dict(image_size=16, patch_size=8)
IMAGE = 150


def llava(text):
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=16)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    config.image_token_index = config.image_token_id = IMAGE
    config.vision_feature_layer = -1
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    vision |= dict(patch_size=8, spatial_merge_size=2, fullatt_block_indexes=[1], window_size=32)
    tokens = dict(image_token_id=IMAGE, video_token_id=151, vision_start_token_id=152)
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **tokens
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 32, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=151,
        eoi_token_index=152,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


COMPOSITE = {
    "llava-llama": lambda: llava(transformers.LlamaConfig(**TEXT)),
    "llava-qwen3": lambda: llava(transformers.Qwen3Config(**TEXT)),
    "qwen2_5_vl": qwen2_5_vl,
    "gemma3": gemma3,
}


def batch(kind):
    """Two texts of 12 tokens, the second padded on the left by 3; LLaVA sees pictures, too."""
    ids = torch.randint(3, 140, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("llava"):
        ids[:, 4:8] = IMAGE
        given["pixel_values"] = torch.randn(2, 3, 16, 16)
    return given


@torch.no_grad()
def route(model):
    for ffn in ffn_layers(model):
        ffn.router.weight.normal_(std=0.5)
        ffn.router.bias.normal_(std=0.5)
        ffn.set_threshold(0.4)
    return model.eval()


@pytest.mark.parametrize("kind", COMPOSITE)
def test_vision_language(kind, tmp_path, seed):
    """The language model becomes sparse, the vision tower stays; padding and loss as elsewhere."""
    dense, given = COMPOSITE[kind]().eval(), batch(kind)
    before = copy.deepcopy(dense.state_dict())
    model = dsmoe_ext.sparsify(dense, 4)
    assert len(ffn_layers(model)) == 2
    torch.testing.assert_close(model(**given).logits, dense(**given).logits, atol=1e-5, rtol=1e-5)
    merged = dsmoe_ext.merge(model)
    assert type(merged) is type(dense)
    assert merged.config.to_diff_dict() == dense.config.to_diff_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, before[name]), name

    dsmoe_ext.active_fraction(route(model))
    want = model(**given).logits
    assert dsmoe_ext.active_fraction(model).num_tokens == given["attention_mask"].sum()
    dsmoe_ext.LambdaController(model, 0.5, start=0.25)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.get_text_config().dsmoe["sparsity_weight"] == 0.25
    assert torch.equal(loaded(**given).logits, want)
    out = loaded.train()(**given, labels=given["input_ids"])
    torch.testing.assert_close(out.loss, out.lm_loss + 0.25 * out.sparsity_loss)
    out.loss.backward()
    assert ffn_layers(loaded)[0].router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", COMPOSITE)
def test_vision_language_generates(kind, seed):
    """All on: the dense model's tokens; routed: with a cache what a whole pass gives."""
    dense, given = COMPOSITE[kind]().eval(), batch(kind)
    pictures = [IMAGE, IMAGE + 1, IMAGE + 2]  # what stands for one may not be said
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=pictures)
    model = dsmoe_ext.sparsify(dense, 4)
    tokens = model.generate(**given, **options)
    assert torch.equal(tokens, dense.generate(**given, **options))
    tokens = route(model).generate(**given, **options)
    ones = torch.ones_like(tokens[:, given["input_ids"].shape[1] :])
    whole = given | {"input_ids": tokens}
    whole["attention_mask"] = torch.cat([given["attention_mask"], ones], dim=1)
    with torch.no_grad():
        logits = model(**whole).logits[:, -5:-1]
    logits[:, :, [2, *pictures]] = -torch.inf  # 2: min_new_tokens, no end
    torch.testing.assert_close(
        logits.max(-1).values, logits.gather(-1, tokens[:, -4:, None])[..., 0]
    )


@pytest.mark.parametrize("kind", COMPOSITE)
def test_vision_language_resumes(kind, tmp_path, seed):
    """Two steps, saved, opened and two more are four steps, to the bit: draws come back."""
    given = batch(kind)
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    whole = route(dsmoe_ext.sparsify(COMPOSITE[kind](), 4, ste="sampled"))
    parts = copy.deepcopy(whole)

    def steps(model, number):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for _ in range(number):
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(whole, 4)
    steps(parts, 2)
    parts.save_pretrained(tmp_path)
    resumed = type(whole).from_pretrained(tmp_path)
    steps(resumed, 2)
    want = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, want[name]), name
    assert ffn_layers(resumed)[0].draw_counter == 4


def tiny_llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).eval()


def test_classifier(tmp_path, seed):
    """The sparsity loss of a classifier: all tokens but padding."""
    route(dsmoe_ext.sparsify(tiny_llama(), 4)).save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path, num_labels=3)
    given = batch("") | {"labels": torch.tensor([0, 2])}
    out = model.train()(**given)
    seen = []
    handles = [
        ffn.register_forward_pre_hook(lambda ffn, args: seen.append((ffn, args[0].detach())))
        for ffn in ffn_layers(model)
    ]
    model(**given)
    [handle.remove() for handle in handles]
    mask = given["attention_mask"].reshape(-1).bool()
    terms = []
    for ffn, x in seen:
        gates, scores = ffn(x, return_routing=True)[1]
        terms.append((scores * (gates != 0))[mask])
    torch.testing.assert_close(out.sparsity_loss, torch.stack(terms).mean())
    torch.testing.assert_close(out.loss, out.lm_loss + out.sparsity_loss)


@pytest.mark.quick
def test_every_constructor(seed):
    """from_config, Class(config), base models, copies and pickles."""
    config = transformers.Qwen3Config(**TEXT, dsmoe={"num_experts": 4, "router_init": "paper"})
    for model in (
        transformers.AutoModelForCausalLM.from_config(config),
        transformers.Qwen3ForCausalLM(config),
        transformers.AutoModel.from_config(config),
        transformers.Qwen3ForTokenClassification(config),
    ):
        assert len(ffn_layers(model)) == 2
        # Tensor parallelism splits attention, not experts.
        assert model._tp_plan and not [name for name in model._tp_plan if ".mlp." in name]
        assert "base_model_tp_plan" not in model.config.to_dict()
        ffn = ffn_layers(model)[0]
        assert 0.01 < ffn.down_proj.weight.std() < 0.03 and ffn.router.weight.std() > 0.01
        ids = torch.randint(3, 140, (1, 7))
        want = model.eval()(ids)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids)[0], want)
            other.train()(ids)
        assert dsmoe_ext.active_fraction(model).num_tokens == 7


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mlp: mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(1))), "scale"),
        (lambda mlp: mlp.add_module("norm", torch.nn.LayerNorm(48)), "LayerNorm inside"),
        (lambda mlp: setattr(mlp, "act_fn", torch.nn.Tanh()), "activation is Tanh"),
        (lambda mlp: setattr(mlp, "forward", lambda x: 2 * x), "computes something else"),
        (lambda mlp: setattr(mlp, "up_proj", torch.nn.Linear(32, 40, bias=False)), "shape"),
        (lambda mlp: setattr(mlp, "up_proj", torch.nn.Linear(32, 48)), "biases"),
        (lambda mlp: setattr(mlp, "up_proj", torch.nn.Embedding(48, 32)), "not a plain nn.Linear"),
    ],
)
def test_refused(change, words):
    model = tiny_llama()
    change(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=words):
        dsmoe_ext.sparsify(model)


@pytest.mark.quick
def test_loss_outside_the_model(seed):
    """A loss of one's own: add_sparsity_loss gives the model's own loss; without it, a warning."""
    model, given = route(dsmoe_ext.sparsify(tiny_llama(), 4)).train(), batch("")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    out = model(**given, labels=labels)
    want = gradients(out.loss)
    logits = model(**given).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = dsmoe_ext.add_sparsity_loss(loss, labels=labels)
    torch.testing.assert_close(loss, out.loss)
    for got, gradient in zip(gradients(loss), want, strict=True):
        torch.testing.assert_close(got, gradient, atol=1e-6, rtol=1e-4)

    model(**given)
    with pytest.warns(UserWarning, match="add_sparsity_loss"):
        model(**given)


def test_calibration_of_a_vision_language_model(seed):
    """On text alone, through the language model's layers."""
    model = COMPOSITE["llava-qwen3"]().eval()
    text = torch.randint(3, 140, (8, 32))
    sparse = dsmoe_ext.calibrate(model, text, expert_size=8, progress=False)
    dsmoe_ext.active_fraction(sparse)
    sparse(text)
    assert abs(dsmoe_ext.active_fraction(sparse).mean - 0.5) <= 0.05


def test_adapters(seed):
    """LoRA leaves routers alone, adapts experts as parameters, and keeps the sparsity loss."""
    peft = pytest.importorskip("peft")
    model, ids = route(dsmoe_ext.sparsify(tiny_llama(), 4)), torch.randint(3, 140, (2, 12))
    want = model(ids).logits
    names = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    lora = peft.LoraConfig(r=2, target_modules="all-linear", target_parameters=names)
    adapted = peft.get_peft_model(model, lora).train()
    layers = {name.split(".")[-1] for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            assert parameter.grad.abs().sum() > 0, name
    model.config.dsmoe["sparsity_weight"] = 0.0
    assert adapted(input_ids=ids, labels=ids).loss < loss
    torch.testing.assert_close(adapted.eval().merge_and_unload()(ids).logits, want)
