"""Every registered method through the whole pipeline: convert, save, train, sweep, merge."""

import copy

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import routers
from dsmoe_ext.calibration.orders import PARTITIONS, neuron_orders
from dsmoe_ext.layers import ffn_layers, start_step, turn

pytestmark = pytest.mark.quick
IDS = torch.arange(60).view(3, 20) % 67
OPTIONS = {"prefix": {"expert_sizes": [6, 6, 12, 24]}, "modse": {"expert_sizes": [21, 3, 14, 10]}}
METHODS = [*routers.router_names(), "top_p with capacity", "top_k over all"]


def convert(make_llama, name, **options):
    method, _, extra = name.partition(" ")
    more = {
        "with capacity": {"router_options": {"capacity_factor": 1.5}},
        "over all": {"router_options": {"renormalize": False}},
    }.get(extra, {})
    llama = make_llama()
    given = {"num_experts": 4} | OPTIONS.get(method, {}) | more | options
    return llama, dsmoe_ext.sparsify(llama, method=method, **given)


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_way(name, make_llama, tmp_path, seed):
    """Saved and loaded it computes the same; a step of training changes routers and experts."""
    _, model = convert(make_llama, name, router_init="paper")
    for ffn in ffn_layers(model):
        for parameter in ffn.router.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    logits = model(IDS).logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, logits)

    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        start_step(model, step)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("gate_proj" in n for n in changed)
    if any(True for _ in ffn_layers(model)[0].router.parameters()):
        assert any("router" in n for n in changed)


@pytest.mark.parametrize("name", ["threshold", "top_p", "prefix", "relu", "top_p with capacity"])
def test_dense_start(name, make_llama, seed):
    """All experts on with gate 1: the dense model."""
    options = {"threshold": 0.5} if name == "threshold" else {"threshold": 1.0}
    if name == "top_p with capacity":
        options["router_options"] = {"capacity_factor": 100.0}
    llama, model = convert(make_llama, name, **options)
    torch.testing.assert_close(model(IDS).logits, llama(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["top_p", "top_k", "modse", "mean_score", "prefix", "recurrent"])
def test_sweep(name, make_llama, seed):
    """The knob moves the active share, and back."""
    _, model = convert(make_llama, name, router_init="paper")
    shares = []
    for value in (0.3, 1.0) if name == "top_p" else (1, 4):
        turn(model, value)
        dsmoe_ext.active_fraction(model)
        model(IDS)
        shares.append(dsmoe_ext.active_fraction(model).mean)
    assert shares[0] < shares[1] == 1


@pytest.mark.parametrize("partition", PARTITIONS)
def test_partitions_merge_exactly(partition, make_llama, seed):
    llama = make_llama()
    orders = neuron_orders(llama, partition, ids=IDS, seed=1, expert_sizes=[20, 10, 18])
    model = dsmoe_ext.sparsify(llama, expert_sizes=[20, 10, 18], permutations=orders)
    torch.testing.assert_close(model(IDS).logits, llama(IDS).logits, rtol=1e-4, atol=1e-4)
    merged = dsmoe_ext.merge(model)
    for (name, ours), theirs in zip(merged.named_parameters(), llama.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_balance_is_what_training_adds(make_llama, seed):
    """loss = lm_loss + sparsity_weight * the layers' mean balance loss, with its gradient."""
    from dsmoe_ext.balance import balance_loss

    _, model = convert(make_llama, "top_k", balance="switch", sparsity_weight=0.5, router_init="paper")  # fmt: skip # noqa: E501
    seen = []
    for ffn in ffn_layers(model):
        ffn.register_forward_hook(lambda m, args, y: seen.append(args[0].detach()))
    model.train()
    out = model(IDS, labels=IDS)
    want = [
        balance_loss(ffn.route(x.flatten(0, 1)))
        for ffn, x in zip(ffn_layers(model), seen, strict=True)
    ]
    # The last token of a window predicts nothing, so its terms do not count; f is of all tokens.
    torch.testing.assert_close(out.loss, out.lm_loss + 0.5 * out.sparsity_loss)
    torch.testing.assert_close(out.sparsity_loss, torch.stack(want).mean(), rtol=0.1, atol=0)
    out.loss.backward()
    assert ffn_layers(model)[0].router.weight.grad.any()


def test_unknown_method(make_llama):
    with pytest.raises(ValueError, match="method must be one of"):
        dsmoe_ext.sparsify(make_llama(), 4, method="best")
    with pytest.raises(TypeError, match="no option 'tau'"):
        dsmoe_ext.sparsify(make_llama(), 4, method="top_p", router_options={"tau": 1})


def test_commands(tmp_path):
    """convert --method --expert-sizes --partition, eval --sweep, place."""
    import json

    from typer.testing import CliRunner

    from dsmoe_ext.command_line.app import app
    from dsmoe_ext.training.data import builtin_text
    from dsmoe_ext.training.tiny import save_tiny_llama

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    save_tiny_llama(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(builtin_text()[:12000])
    text = ("--data", tmp_path / "text.txt", "--window", 64)
    pairs = ("--expert-sizes", "pairs:4.5,0.5;4,1;3,2;2.5,2.5")
    how = ("--method", "modse", *pairs, "--partition", "gate_rows", "--router-init", "paper")
    run("convert", tmp_path / "dense", tmp_path / "sparse", *how)
    clustered = ("--partition", "coactivation", *text[:2], "--experts", 4)
    run("convert", tmp_path / "dense", tmp_path / "clustered", *clustered)
    run("prune", tmp_path / "clustered", tmp_path / "pruned", "--keep", 0.5, "--tokens", 512, *text)
    rows = json.loads(run("eval", tmp_path / "sparse", "--sweep", "1,8", "--json", *text))
    active = [row["active_ffn"] for row in rows]
    assert active[1] < active[0] < active[2] == 1
    plan = ("--ranks", 4, "--tokens", 512, "--out", tmp_path / "plan.json", "--json")
    placed = json.loads(run("place", tmp_path / "sparse", *plan, *text))
    assert placed["after"]["parameters"] <= 1.05
    ranks = json.loads((tmp_path / "plan.json").read_text())
    assert all(sorted(e for rank in layer for e in rank) == list(range(8)) for layer in ranks)

    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "dense"), str(tmp_path / "other"), "--method", "best"]
    )
    assert result.exit_code == 1 and "there is no router 'best'" in result.stderr
    assert not (tmp_path / "other").exists()


def test_balance_counts_as_in_the_papers(make_llama):
    """Whether the loss was asked for or comes with the method."""
    for options in ({"method": "modse"}, {"method": "top_p", "balance": "switch"}):
        model = dsmoe_ext.sparsify(make_llama(), 4, **options)
        assert model.config.dsmoe["sparsity_weight"] == 0.01
    model = dsmoe_ext.sparsify(make_llama(), 4, method="modse", sparsity_weight=0.5)
    assert model.config.dsmoe["sparsity_weight"] == 0.5
    assert dsmoe_ext.sparsify(make_llama(), 4, method="relu").config.dsmoe["sparsity_weight"] == 1.0
