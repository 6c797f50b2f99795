"""Sparse models in transformers: loss, accumulation, checkpointing, generation, compilation."""

import copy
import gc
import weakref

import pytest
import torch

import dsmoe_ext

transformers = pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from dsmoe_ext.sparsity import ForwardPass  # noqa: E402

pytestmark = pytest.mark.quick


def random_batch(rows: int, length: int = 12) -> dict:
    """Unequal lengths, padded on the right, some labels masked besides the padding."""
    ids = torch.randint(1, 67, (rows, length))
    lengths = torch.randint(3, length + 1, (rows, 1))
    attention_mask = (torch.arange(length) < lengths).long()
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[torch.rand(labels.shape) < 0.2] = -100
    labels[:, 2] = ids[:, 2]  # at least one label a row
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def gradients(model) -> dict:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict, theirs: dict, exactly: bool = False) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if exactly:
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], atol=2e-6, rtol=1e-4)


def test_loss_is_lm_loss_plus_sparsity_in_training_only(make_sparse, seed):
    model = make_sparse(sparsity_weight=0.7)
    batch = random_batch(4)
    evaluated = model.eval()(**batch)
    trained = model.train()(**batch)
    logits, labels = evaluated.logits[:, :-1], batch["labels"][:, 1:]
    lm_loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 67), labels.reshape(-1))

    torch.testing.assert_close(evaluated.loss, lm_loss)
    torch.testing.assert_close(evaluated.lm_loss, lm_loss)
    torch.testing.assert_close(trained.lm_loss, lm_loss)
    torch.testing.assert_close(trained.loss, lm_loss + 0.7 * evaluated.sparsity_loss)
    assert model.eval()(input_ids=batch["input_ids"]).loss is None


def live_passes():
    gc.collect()
    return sum(isinstance(kept, ForwardPass) for kept in gc.get_objects())


@pytest.mark.parametrize("compiles", ["nothing", "a layer", "all layers"])
@pytest.mark.parametrize("ends", ["in its own loss", "in a loss of the logits", "nowhere"])
def test_a_step_leaves_nothing_behind(make_sparse, ends, compiles, seed):
    """Its graph, which holds logits and activations, is freed with the outputs."""
    model, ids = make_sparse().train(), torch.randint(67, (2, 9))
    for layer in model.model.layers[1 if compiles == "a layer" else 0 :]:
        if compiles != "nothing":
            layer.compile(backend="aot_eager")

    def step():
        out = model(input_ids=ids, labels=ids)
        if ends == "in its own loss":
            out.loss.backward()
        elif ends == "in a loss of the logits":
            out.logits.sum().backward()

    step()
    before = live_passes()
    for _ in range(3):
        step()
    assert live_passes() == before


@pytest.mark.parametrize("after", ["inference", "a step", "a backward that failed"])
def test_a_model_is_freed(make_sparse, after, seed):
    """Nothing in the package keeps a model that nobody uses any more."""
    model, ids = make_sparse(), torch.randint(67, (2, 9))
    if after == "inference":
        with torch.no_grad():
            model.eval()(input_ids=ids)
    else:
        loss = model.train()(input_ids=ids, labels=ids).loss
        if after == "a backward that failed":
            handle = model.get_input_embeddings().weight.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            handle.remove()
        else:
            loss.backward()
        del loss
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("compiles", [[0], [1], [0, 1]])
def test_sparsity_gradient_of_layers_compiled_one_by_one(make_sparse, compiles, seed):
    model, batch = make_sparse(ste="exact").train(), random_batch(4)
    model(**batch).loss.backward()
    want = gradients(model)
    model.zero_grad()
    for index in compiles:
        model.model.layers[index].compile(backend="aot_eager")
    model(**batch).loss.backward()
    assert_same(gradients(model), want)


@pytest.mark.parametrize("gates", ["scores", "binary"])
def test_sparsity_loss_by_hooks(make_sparse, gates, seed):
    """(1/(T·L·E)) sum of G over the tokens that predict a label, layers and routed experts."""
    model = make_sparse(gates=gates, shared_size=8).train()
    batch = random_batch(3)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda ffn, args: seen.append((ffn, args[0].detach())))
    out = model(**batch)
    seen = [ffn(x, return_routing=True)[1] for ffn, x in seen[:3]]
    predicts = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1)).reshape(-1)
    if gates == "scores":
        terms = [r.scores[predicts] * (r.gates[predicts, 1:] != 0) for r in seen]
    else:
        terms = [r.scores[predicts] for r in seen]
    torch.testing.assert_close(out.sparsity_loss, torch.stack(terms).mean())


@pytest.mark.parametrize("ste", ["active", "exact"])
def test_accumulation_equals_one_large_batch(make_sparse, ste, seed):
    model = make_sparse(ste=ste, sparsity_weight=2.0).train()
    batch = random_batch(8)
    loss = model(**batch).loss
    loss.backward()
    large = gradients(model)
    model.zero_grad()

    items = (batch["labels"][:, 1:] != -100).sum()
    total = 0.0
    for rows in ([0], [1, 2, 3], [4, 5], [6, 7]):
        part = {name: value[rows] for name, value in batch.items()}
        out = model(**part, num_items_in_batch=items)
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert_same(gradients(model), large)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def train(model, batch, folder, micro_batch, accumulate, resume=None, callbacks=(), **options):
    """transformers.Trainer as it is, plain SGD, so that the weights show the gradients."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.5,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **({"save_strategy": "no", "max_steps": 1} | options),
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Rows(batch),
        eval_dataset=Rows(batch),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_trainer_accumulation(make_sparse, tmp_path, use_reentrant, seed):
    """Four micro-batches are one large batch, with and without gradient checkpointing."""
    model = make_sparse(ste="exact", sparsity_weight=2.0)
    batch = random_batch(8)
    other = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    train(model, batch, tmp_path, 8, 1)
    options = {}
    if use_reentrant is not None:
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    trainer = train(other, batch, tmp_path, 2, 4, **options)
    assert_same(
        {n: v.float() for n, v in other.state_dict().items()},
        {n: v.float() for n, v in model.state_dict().items()},
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(start[name], other.state_dict()[name])

    lm_loss = sum(
        other.eval()(**{n: v[i : i + 2] for n, v in batch.items()}).lm_loss.item()
        for i in range(0, 8, 2)
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(lm_loss / 4, rel=1e-4)


def test_trainer_resumes(make_sparse, tmp_path, seed):
    """Two steps, a kill and two more are four steps: the thresholds and draws come back as well."""
    batch = random_batch(16)
    whole = make_sparse(ste="sampled")
    parts = [copy.deepcopy(whole) for _ in range(2)]

    def run(model, folder, **options):
        controller = dsmoe_ext.ThresholdController(model, 0.3)
        train(model, batch, folder, 2, 2, callbacks=[controller.trainer_callback()], **options)

    run(whole, tmp_path / "whole", max_steps=4)
    saving = dict(save_strategy="steps", save_steps=2)
    run(parts[0], tmp_path / "parts", max_steps=2, **saving)
    run(parts[1], tmp_path / "parts", max_steps=4, resume=True, **saving)
    assert_same(parts[1].state_dict(), whole.state_dict(), exactly=True)
    assert whole.model.layers[0].mlp.threshold != 0.5
    assert whole.model.layers[0].mlp.draw_counter == 8


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("ste", ["exact", "sampled"])
def test_gradient_checkpointing(make_sparse, use_reentrant, ste, seed):
    """The same bits as without, in every gradient, draws and statistics included."""
    model = make_sparse(ste=ste, sparsity_weight=3.0).train()
    batches = [random_batch(3), random_batch(2)]

    def run(model):
        # Both forwards before both backwards: each recomputation needs its own forward's draw.
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward()
        return gradients(model), losses, dsmoe_ext.active_fraction(model)

    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    want, losses, fraction = run(model)
    got, other_losses, other_fraction = run(checkpointed)
    assert_same(got, want, exactly=True)
    assert losses == other_losses
    assert fraction == other_fraction
    assert fraction.num_tokens == sum(batch["attention_mask"].sum() for batch in batches)
    assert model.model.layers[1].mlp.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_two_forwards_in_one_backward(make_sparse, use_reentrant, seed):
    """Their loss scaled, too, as a GradScaler does; reentrant checkpointing cannot tell them apart
    and says so."""
    model = make_sparse(sparsity_weight=3.0).train()
    batches = [random_batch(3), random_batch(2)]
    for batch in batches:
        (1024 * model(**batch).loss).backward()
    want = gradients(model)
    model.zero_grad()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss = 1024 * sum(model(**batch).loss for batch in batches)
    if use_reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            loss.backward()
        return
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[name], atol=2e-3, rtol=1e-4)


def test_statistics_leave_padding_out(make_sparse, seed):
    """The share is that of the same text without padding, whichever side it is on."""
    model = make_sparse().eval()
    ids = torch.randint(1, 67, (1, 7))
    model(ids)
    plain = dsmoe_ext.active_fraction(model)
    for left in (True, False):
        pad = (5, 0) if left else (0, 5)
        padded = torch.nn.functional.pad(ids, pad)
        mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        for labels in (None, padded):
            model(padded, attention_mask=mask, position_ids=position_ids, labels=labels)
            assert dsmoe_ext.active_fraction(model) == plain
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert dsmoe_ext.active_fraction(model).num_tokens == 7 + 3
    padded = torch.nn.functional.pad(ids, (5, 0)).expand(2, -1)
    mask = (padded != 0).long()
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, attention_mask=mask)
    for cache in (None, "static"):  # the latter hands the model masks that are made already
        model.generate(padded, cache_implementation=cache, **options)
        assert dsmoe_ext.active_fraction(model).num_tokens == 2 * (7 + 3)


def test_generate_with_and_without_cache(make_sparse, seed):
    model = make_sparse().eval()
    ids = torch.randint(1, 67, (2, 9))
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    options["attention_mask"] = torch.ones_like(ids)
    cached = model.generate(ids, **options)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert torch.equal(cached, dsmoe_ext.pack(model).generate(ids, **options))

    mask = torch.ones(2, 14, dtype=torch.long)
    mask[:, :5] = 0
    padded = torch.nn.functional.pad(ids, (5, 0))
    longer = model.generate(padded, **(options | {"attention_mask": mask}))
    assert torch.equal(longer[:, 14:], cached[:, 9:])


def test_hidden_states_and_attentions(make_sparse, seed):
    model = make_sparse(llama={"attn_implementation": "eager"}).eval()
    out = model(torch.randint(1, 67, (2, 5)), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert out.hidden_states[1].shape == (2, 5, 32)
    ids = torch.ones(1, 4).long()
    loss, logits = model.train()(ids, labels=ids, return_dict=False)[:2]
    assert loss.dim() == 0 and logits.shape == (1, 4, 67)


def test_bf16_autocast_training(make_sparse, seed):
    # Every expert active: a score that bf16 moves over the threshold would change the loss at will.
    model = make_sparse(ste="exact", threshold=0.0).train()
    batch = random_batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    full = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert out.sparsity_loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, full.loss, rtol=0.02, atol=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all()


def test_compiles_as_one_graph(make_sparse, seed):
    model = make_sparse(ste="sampled").train()
    batch = random_batch(2)
    model(**batch).loss.backward()
    want = gradients(model)
    model.zero_grad()
    for layer in model.model.layers:
        layer.mlp.draw_counter.zero_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch).loss.backward()
    assert_same(gradients(model), want)


def test_from_scratch(seed):
    config = AutoConfig.for_model(
        "dsmoe_llama", vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_experts=6, router_init="paper",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ffn = model.model.layers[0].mlp
    assert 0.01 < ffn.down_proj.weight.std() < 0.03 and ffn.router.weight.std() > 0.01
    assert model(torch.ones(1, 4).long(), labels=torch.ones(1, 4).long()).loss > 0
    assert dsmoe_ext.active_fraction(model).num_tokens == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "relu"}, "SiLU"),
        ({"num_experts": 7}, "does not divide"),
        ({"gates": "hard"}, "scores, binary"),
    ],
)
def test_config_errors(fields, words):
    small = dict(vocab_size=7, hidden_size=8, intermediate_size=48, num_hidden_layers=1)
    small |= dict(num_attention_heads=2)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_config(dsmoe_ext.DSMoELlamaConfig(**(small | fields)))
