"""dsmoe_ext/training: windows, perplexity, fine-tuning, resuming."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch

from dsmoe_ext.convert import convert_llama
from dsmoe_ext.errors import UserError
from dsmoe_ext.training.callbacks import read_log
from dsmoe_ext.training.checkpoint import find_checkpoints
from dsmoe_ext.training.data import (
    builtin_text,
    prose_text,
    second_domain_text,
    split_windows,
    windows_of,
)
from dsmoe_ext.training.evaluate import evaluate
from dsmoe_ext.training.fine_tune import TrainSettings, fine_tune, training_arguments
from dsmoe_ext.training.measure import active_parameters, generate, threshold
from dsmoe_ext.training.tiny import byte_tokenizer, tiny_llama
from dsmoe_ext.training.trainer import SparseTrainer

# Far larger rates than for a real model: the tiny ones shall learn something in a few steps.
FAST = TrainSettings(steps=8, lr=5e-3, router_lr=5e-3, bf16=False)


def tiny_windows(length: int = 32, characters: int = 8000):
    return windows_of(byte_tokenizer(), builtin_text()[:characters], length)


def tiny_sparse(seed: int = 0, **options):
    return convert_llama(tiny_llama(seed), 4, **({"seed": seed} | options))


def same_bits(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ----------------------------------------------------------------------------------------- windows


@pytest.mark.quick
@pytest.mark.parametrize("bos", [None, 7])
def test_every_tenth_window_is_held_out(bos):
    ids = torch.arange(1000, 1000 + 643)
    windows = split_windows(ids, 16, bos)
    content = slice(1 if bos is not None else 0, None)
    step = 15 if bos is not None else 16
    num = 643 // step
    assert len(windows.held_out) == num // 10
    assert len(windows.train) + len(windows.held_out) == num
    for k, window in enumerate(windows.held_out):
        first = (10 * k + 9) * step
        assert torch.equal(window[content], ids[first : first + step])
    train = set(windows.train[:, content].flatten().tolist())
    held_out = set(windows.held_out[:, content].flatten().tolist())
    assert not train & held_out
    assert train | held_out == set(ids[: num * step].tolist())
    assert windows.num_context == (bos is not None)


@pytest.mark.quick
def test_short_texts():
    windows = split_windows(torch.arange(40), 16)
    assert len(windows.train) == 1 and len(windows.held_out) == 1
    with pytest.raises(UserError, match="two windows"):
        split_windows(torch.arange(31), 16)
    with pytest.raises(UserError, match="at least 2"):
        split_windows(torch.arange(31), 1)


@pytest.mark.quick
def test_bos_follows_the_tokenizer():
    assert tiny_windows().num_context == 0
    windows = windows_of(byte_tokenizer(add_bos=True), "x" * 1000, 20)
    assert windows.num_context == 1
    assert (windows.train[:, 0] == 256).all() and (windows.train[:, 1:] < 256).all()


@pytest.mark.quick
def test_texts():
    assert len(builtin_text()) > 300_000
    assert len(second_domain_text()) > 50_000
    assert len(prose_text()) > 40_000


# -------------------------------------------------------------------------------------- evaluation


@pytest.mark.quick
@pytest.mark.parametrize("context", [0, 1, 5])
def test_perplexity_is_what_it_says(context):
    model, windows = tiny_llama().eval(), tiny_windows()
    ids = windows.held_out
    got = evaluate(model, ids, num_context=context, batch_size=3)
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)
    first = max(context, 1)
    picked = log_p[:, first - 1 : -1].gather(2, ids[:, first:, None])
    assert got.num_tokens == picked.numel()
    assert got.perplexity == pytest.approx(math.exp(-picked.mean().item()), rel=1e-5)
    assert got.active == 1.0 and got.active_per_layer == []


@pytest.mark.quick
def test_evaluation_reports_what_was_active():
    model, ids = tiny_sparse().train(), tiny_windows().held_out
    result = evaluate(model, ids)
    assert result.active_per_layer == [1.0, 1.0] and model.training
    with threshold(model, 1.0):
        result = evaluate(model, ids)
    assert result.active == 0.0
    ffn = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    routers = sum(p.numel() for n, p in model.named_parameters() if "router" in n)
    total = sum(p.numel() for p in model.parameters())
    share = active_parameters(model, result.active_per_layer)
    assert share == pytest.approx(1 - (ffn - routers) / total)
    assert evaluate(model, ids).active == 1.0  # the thresholds are back


@pytest.mark.quick
def test_generate_with_a_cache_equals_without(seed):
    model, ids = tiny_sparse(seed).eval(), tiny_windows().held_out[:1, :8]
    result = generate(model, ids, 12, min_new_tokens=12)
    row = ids
    for token in result.ids:
        with torch.no_grad():
            logits = model(row, use_cache=False).logits[0, -1].clone()
        logits[257] = -math.inf  # min_new_tokens forbids the end
        assert logits.argmax().item() == token
        row = torch.cat([row, torch.tensor([[token]])], dim=1)
    drawn = [generate(model, ids, 8, temperature=1.0, seed=s).ids for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


# ---------------------------------------------------------------------------------------- training


@pytest.mark.quick
def test_schedule_and_groups(tmp_path):
    model, settings = tiny_sparse(), TrainSettings(steps=100, warmup=0.1, bf16=False)
    arguments = training_arguments(model, settings, tmp_path, 0)
    trainer = SparseTrainer(model, arguments, router_lr=settings.router_lr)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [settings.lr, settings.router_lr]
    assert len(groups[1]["params"]) == 4  # weight and bias of two routers
    rates = []
    for _ in range(100):
        rates.append([group["lr"] for group in groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    factors = [rate / settings.lr for rate, _ in rates]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 == factors[10]
    assert factors[-1] == pytest.approx(0.11) and factors[10:] == sorted(factors[10:])[::-1]
    assert [router / settings.router_lr for _, router in rates] == pytest.approx(factors)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_only_the_ffns_learn(kind):
    model = tiny_llama() if kind == "dense" else tiny_sparse()
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = dataclasses.replace(FAST, steps=2, trained="ffn", distill=1.0)
    fine_tune(model, tiny_windows(), settings, teacher=tiny_llama(1).eval())
    changed = {name for name, value in model.named_parameters() if (value != before[name]).any()}
    assert changed == {name for name in before if ".mlp." in name}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="all, ffn"):
        fine_tune(model, tiny_windows(), dataclasses.replace(settings, trained="router"))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_training_learns(kind):
    model = tiny_llama() if kind == "dense" else tiny_sparse(sparsity_weight=0.0)
    windows = tiny_windows()
    before = evaluate(model, windows.held_out).loss
    rows = fine_tune(model, windows, dataclasses.replace(FAST, steps=30))
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert evaluate(model, windows.held_out).loss < before - 0.5
    assert ("active" in rows[0]) == (kind == "sparse")


def test_the_controller_holds_the_target(seed):
    model = tiny_sparse(seed, router_init="paper", router_bias=True, sparsity_weight=0.0)
    settings = dataclasses.replace(
        FAST, steps=60, lr=1e-3, router_lr=1e-4, target_active=0.4, controller_rate=0.2, seed=seed
    )
    rows = fine_tune(model, tiny_windows(), settings)
    late = [row["active"] for row in rows[-10:]]
    assert sum(late) / len(late) == pytest.approx(0.4, abs=0.08)
    assert rows[-1]["thresholds"] == [layer.mlp.threshold.item() for layer in model.model.layers]


def test_distillation_moves_towards_the_teacher(seed):
    model, teacher, windows = tiny_llama(seed), tiny_llama(seed + 1).eval(), tiny_windows()

    def distance() -> float:
        with torch.no_grad():
            p, q = (m(windows.held_out).logits.log_softmax(-1) for m in (teacher, model))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    before = distance()
    fine_tune(model, windows, dataclasses.replace(FAST, distill=1.0, steps=20), teacher=teacher)
    assert distance() < 0.7 * before


@pytest.mark.parametrize("fails", [False, True])
def test_a_trained_model_computes_in_its_own_dtype(seed, fails):
    """Autocast of the training is gone with it."""
    model, windows = tiny_sparse(seed), tiny_windows()

    def stop(row):
        raise KeyboardInterrupt

    settings = dataclasses.replace(FAST, steps=2, bf16=True)
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        fine_tune(model, windows, settings, on_step=stop if fails else None)
    fresh = tiny_sparse(seed)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        got, want = (m.eval()(windows.held_out).logits for m in (model, fresh))
    assert torch.equal(got, want)


def test_accumulation_equals_one_large_batch():
    windows, results = tiny_windows(), []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        model = tiny_sparse().double()
        settings = TrainSettings(
            steps=3, batch_size=batch_size, accumulate=accumulate, lr=1e-3, bf16=False
        )
        results.append([row["loss"] for row in fine_tune(model, windows, settings)])
    assert results[0] == pytest.approx(results[1], rel=1e-6)  # fp32 losses


@pytest.mark.parametrize("kind", ["dense", "active", "sampled"])
def test_resuming_gives_the_same_bits(tmp_path, kind, seed):
    windows = tiny_windows()
    settings = dataclasses.replace(
        FAST, seed=seed, target_active=None if kind == "dense" else 0.8, controller_rate=1.0
    )

    def fresh():
        return tiny_llama(seed) if kind == "dense" else tiny_sparse(seed, ste=kind)

    straight = fresh()
    wanted = fine_tune(straight, windows, settings, run_dir=tmp_path / "a", checkpoint_every=3)
    stopped = fresh()

    def stop(row):
        torch.rand(row["step"])  # random numbers that others draw are put back, too
        if row["step"] == 5:
            raise KeyboardInterrupt

    run_dir = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(stopped, windows, settings, run_dir=run_dir, checkpoint_every=3, on_step=stop)
    assert [step for step, _ in find_checkpoints(run_dir)] == [3]
    resumed = fresh()
    got = fine_tune(resumed, windows, settings, run_dir=run_dir, checkpoint_every=3, resume=True)
    timing = {"seconds", "tokens_per_second", "train_runtime", "train_tokens_per_second"}

    def untimed(rows):
        return [{k: v for k, v in row.items() if k not in timing} for row in rows]

    assert untimed(got) == untimed(wanted)
    assert untimed(read_log(run_dir / "train.jsonl")) == untimed(wanted)
    assert same_bits(resumed, straight)


def test_resuming_refuses_what_would_differ(tmp_path):
    windows = tiny_windows()
    fine_tune(tiny_llama(), windows, FAST, run_dir=tmp_path, checkpoint_every=4)
    for change, message in (({"lr": 1e-4}, "another lr"), ({"seed": 3}, "another seed")):
        settings = dataclasses.replace(FAST, **change)
        with pytest.raises(UserError, match=message):
            fine_tune(tiny_llama(), windows, settings, run_dir=tmp_path, resume=True)
    with pytest.raises(UserError, match="another data"):
        fine_tune(tiny_llama(), tiny_windows(33), FAST, run_dir=tmp_path, resume=True)
    with pytest.raises(UserError, match="another tensors"):
        wide = tiny_llama(intermediate_size=64)
        fine_tune(wide, windows, FAST, run_dir=tmp_path, resume=True)
    ((_, folder),) = find_checkpoints(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        fine_tune(tiny_llama(), windows, FAST, run_dir=tmp_path, resume=True)


@pytest.mark.quick
def test_a_diverging_run_stops():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not finite at step 1"):
        fine_tune(model, tiny_windows(), FAST)


@pytest.mark.quick
def test_log_cut_short_by_a_kill(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]


def test_byte_tokenizer_round_trip():
    tokenizer = byte_tokenizer()
    text = "Größe: 3 → 4\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
