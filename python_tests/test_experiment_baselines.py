"""`dsmoe experiment baselines`: each recipe against its definition, on a tiny model."""

import json
import math
import operator

import pytest
import torch
from typer.testing import CliRunner

import dsmoe_ext
from dsmoe_ext.calibration.dense_ffn import DenseFFN
from dsmoe_ext.calibration.layerwise import fit_layers
from dsmoe_ext.command_line.app import app
from dsmoe_ext.experiments.baselines import batches_table, recipes
from dsmoe_ext.experiments.cmoe import (
    Cut,
    Recipe,
    Representatives,
    UnitRows,
    group_by_markers,
    representatives,
)
from dsmoe_ext.experiments.neuron_sparsity import fit_cats, fit_flap, fit_teal
from dsmoe_ext.experiments.reads import Reads, reads_of_skipping
from dsmoe_ext.experiments.replaced import replaced_ffns
from dsmoe_ext.gated_mlp import SPLIT, GatedMLP
from dsmoe_ext.training.tiny import save_tiny_llama, tiny_llama

pytestmark = pytest.mark.quick


def some_text(windows=16):
    return torch.randint(256, (windows, 64))


def fitted(model, text, fit, share):
    return fit_layers(model, text, lambda ffn, chunks, index: fit(ffn, chunks, share, index))


@pytest.mark.parametrize("name", list(recipes(0.5)))
def test_a_share_of_one_is_the_dense_model(name, seed):
    model, text = tiny_llama().double(), some_text()  # float32 would take bf16 products
    fit = recipes(1.0)[name.replace("S2A2", "S4A4").replace("S4A4E16", "S8A8E16")]
    ffns = fitted(model, text, fit, 1.0)
    with torch.no_grad():
        whole = model(text).logits
        reads = Reads(2, text.numel())
        with reads_of_skipping(model, ffns, reads):
            torch.testing.assert_close(model(text).logits, whole)
        assert torch.equal(model(text).logits, whole)
    assert reads.active == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("name", list(recipes(0.5)))
def test_the_share_holds_on_the_text(name, seed):
    model, text = tiny_llama(), some_text()
    ffns = fitted(model, text, recipes(0.5)[name], 0.5)
    reads = Reads(2, text.numel())
    with torch.no_grad(), reads_of_skipping(model, ffns, reads):
        model(text)
    assert reads.active == pytest.approx([0.5, 0.5], abs=0.02)
    assert reads.together(1) == pytest.approx(0.5, abs=0.03)
    unions = [reads.together(size) for size in (1, 8, 64)]
    if name.startswith("static"):
        assert unions == pytest.approx([0.5] * 3)
    else:
        assert unions[0] < unions[1] < unions[2] <= 1 + 1e-9
    assert unions[2] > 0.95 or name not in ("TEAL", "CATS")


def test_thresholds_against_quantiles(seed):
    model, text = tiny_llama().double(), some_text()
    seen = {}

    def fit(ffn, chunks, index):
        if not seen:
            x = torch.cat([x for x, _ in chunks()])
            gate = torch.nn.functional.silu(x @ ffn.gate_proj.T)
            seen.update(x=x, gate=gate, a=gate * (x @ ffn.up_proj.T), ffn=ffn)
            seen.update(teal=fit_teal(ffn, chunks, 0.4), cats=fit_cats(ffn, chunks, 0.4))
        return fit_teal(ffn, chunks, 0.4)

    fit_layers(model, text, fit)
    x, gate, ffn, teal = seen["x"], seen["gate"], seen["ffn"], seen["teal"]
    assert (x.abs() > teal.input_threshold).double().mean() == pytest.approx(0.4, abs=2e-3)
    assert (gate.abs() > seen["cats"].threshold).double().mean() == pytest.approx(0.1, abs=2e-3)
    kept = x * (x.abs() > teal.input_threshold)
    hidden = torch.nn.functional.silu(kept @ ffn.gate_proj.T) * (kept @ ffn.up_proj.T)
    assert (hidden.abs() > teal.threshold).double().mean() == pytest.approx(0.4, abs=2e-3)
    wanted = (hidden * (hidden.abs() > teal.threshold)) @ ffn.down_proj_t
    torch.testing.assert_close(teal.output(ffn, x), wanted)
    wanted = (seen["a"] * (gate.abs() > seen["cats"].threshold)) @ ffn.down_proj_t
    torch.testing.assert_close(seen["cats"].output(ffn, x), wanted)
    with pytest.raises(ValueError, match="a third of the FFN"):
        fit_cats(ffn, None, 0.3)


def test_flaps_bias_makes_the_mean_exact(seed):
    model, text = tiny_llama().double(), some_text()

    def fit(ffn, chunks, index):
        flap = fit_flap(ffn, chunks, 0.5)
        x = torch.cat([x for x, _ in chunks()])
        hidden = ffn.activate(x)
        torch.testing.assert_close(flap.output(ffn, x).mean(0), ffn.output(hidden).mean(0))
        fluctuation = hidden.var(0) * ffn.down_proj_t.square().sum(1)
        assert set(flap.kept.nonzero().flatten().tolist()) == set(
            fluctuation.argsort(descending=True)[:48].tolist()
        )
        return flap

    assert len(fit_layers(model, text, fit)) == 2


def test_cmoes_partition(seed):
    """Shared by rate, balanced, the same again; every representative against its definition."""
    x, gate, up = torch.randn(200, 8), torch.randn(100, 8), torch.randn(100, 8)
    markers = UnitRows(gate, up, "silu").markers(x)
    assert markers.sum(1).tolist() == [10] * 200
    x = torch.nn.functional.normalize(x, dim=1)
    hidden = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs()
    least = hidden.where(markers, torch.inf).min(1).values
    assert (least >= hidden.where(~markers, 0.0).max(1).values).all()
    layout = Cut.of(8, 0.5).layout(100)
    assert str(Cut.of(8, 0.5)) == "S2A2E8" and str(Cut.of(16, 0.5)) == "S4A4E16"
    assert layout.shared_size == 28 and layout.expert_sizes == [12] * 6
    order = group_by_markers(markers, layout)
    assert torch.equal(order, group_by_markers(markers, layout))
    assert order.sort().values.tolist() == list(range(100))
    rates = markers.float().mean(0)
    assert rates[order[:28]].min() >= rates[order[28:]].max()
    chosen = representatives(markers, order, layout)
    for expert, neuron in enumerate(chosen.tolist()):
        neurons = order[28 + 12 * expert : 40 + 12 * expert]
        centre = markers[:, neurons].double().mean(1)
        distance = {int(n): (markers[:, n].double() - centre).abs().sum() for n in neurons}
        assert distance[neuron] <= min(distance.values()) + 1e-9  # any of those equally near


def test_the_representatives_router(seed):
    """Against a loop over tokens and experts."""
    weights = [torch.randn(9, 8), torch.randn(9, 8), torch.randn(8, 9)]
    ffn = DenseFFN(GatedMLP(SPLIT, "silu", 8, 9), weights)
    x, chosen = torch.randn(20, 8), [5, 0, 8, 2]
    active = Representatives(UnitRows.of(ffn)[torch.tensor(chosen)], 2)(x)
    for token, on in zip(x.tolist(), active, strict=True):
        scores = []
        for neuron in chosen:
            rows = [row[neuron].tolist() for row in weights[:2]]
            gate, up = (sum(map(operator.mul, row, token)) / math.hypot(*row) for row in rows)
            scores.append(abs(gate / (1 + math.exp(-gate)) * up))
        best = sorted(range(4), key=lambda e: -scores[e])[:2]
        assert on.nonzero().flatten().tolist() == sorted(best)


def test_our_parts_take_the_place_of_cmoes(seed):
    """All three ours: what calibrate makes of the same cut."""
    model, text = tiny_llama().double(), some_text()
    ours = Recipe(Cut.of(8, 0.5), True, True, True)
    assert str(ours) == "CMoE S2A2E8, our partition, our router, our refit"
    sizes = ours.cut.layout(96).expert_sizes
    sparse = dsmoe_ext.calibrate(model, text, expert_sizes=sizes, shared=0.25, progress=False)
    ffns = fitted(model, text, ours.fit, 0.5)
    with torch.no_grad(), replaced_ffns(model, [ffn.output for ffn in ffns]):
        torch.testing.assert_close(model(text).logits, sparse(text).logits)


def test_what_tokens_read_together():
    reads = Reads(1, 6)
    on = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    channels = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    reads.add(0, on[:1], channels)
    reads.add(0, on[1:], channels)
    assert reads.active == [pytest.approx((0.75 + 0.75 + 0.5 + 0.75) / 4)]
    assert reads.together(2) == pytest.approx((0.75 + 1.0) / 2)  # tokens 0 and 2, 1 and 3
    assert reads.together(64) == 1.0
    rows = [{"what": {"row": "a"}, "batches": {"t": {"1": 0.5, "8": 0.75, "64": 1.0}}},
            {"what": {"row": "dense"}}]  # fmt: skip
    assert batches_table(rows).splitlines()[2:] == ["| a | 0.500 | 0.750 | 1.000 |"]


def test_a_sample_is_spread_over_the_text():
    reads = Reads(1, 8192)
    assert reads.step == 17
    on = torch.eye(8192, dtype=torch.bool)
    for part in on.split(1000):
        reads.add(0, part, torch.ones(8192, dtype=torch.float64))
    kept = torch.cat(reads.sample[0]).nonzero()[:, 1]
    assert kept.tolist() == list(range(0, 8192, 17))


def test_baselines_go_on_where_they_stopped(tmp_path):
    save_tiny_llama(tmp_path / "model")
    arguments = ["experiment", "baselines", "--model", tmp_path / "model", "--windows", 1]
    arguments = [str(a) for a in [*arguments, "--tokens", 2048, "--out", tmp_path]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    file = tmp_path / "baselines.jsonl"
    before = file.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    names = [row["what"]["row"] for row in rows]
    assert names == ["dense", "ours", "static: strongest + refit", *recipes(0.5)]
    for row in rows[1:]:
        for text, share in row["active"].items():
            assert row["batches"][text]["1"] == pytest.approx(share, abs=0.05)
            assert share == pytest.approx(sum(row["layers"][text]) / 2)
    tables = result.stdout.split("\n\n")
    assert len(tables) == 2 and "| tokens together | 1 | 8 | 64 |" in tables[1]
    file.write_text("".join(before.splitlines(keepends=True)[:-1]))
    again = CliRunner().invoke(app, arguments)
    assert again.stdout == result.stdout and len(file.read_text().splitlines()) == len(rows)
