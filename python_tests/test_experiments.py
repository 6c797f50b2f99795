"""`dsmoe experiment`: rows are measured once; the oracles keep their share."""

import json

import pytest
import torch
from typer.testing import CliRunner

import dsmoe_ext
from dsmoe_ext.command_line.app import app
from dsmoe_ext.errors import UserError
from dsmoe_ext.experiments.oracle import masked_ffns, strongest_experts, strongest_neurons
from dsmoe_ext.experiments.plot import series_of
from dsmoe_ext.experiments.record import Record, markdown
from dsmoe_ext.training.tiny import save_tiny_llama, tiny_llama


@pytest.mark.quick
def test_a_row_is_measured_once(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    record = Record(path)
    assert record.measure({"row": "x"}, lambda: {"loss": 1.5}) == {
        "what": {"row": "x"},
        "loss": 1.5,
    }
    with open(path, "a") as file:
        file.write('{"what": {"row": "y"}, "lo')  # killed while writing
    again = Record(path)
    assert again.measure({"row": "x"}, pytest.fail)["loss"] == 1.5
    again.measure({"row": "y"}, lambda: {"loss": 2.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.5, 2.0]
    path.write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        Record(path)


@pytest.mark.quick
def test_markdown():
    lines = markdown(["", "a"], [["x", "1"]]).splitlines()
    assert lines == ["|  | a |", "| --- | ---: |", "| x | 1 |"]


@pytest.mark.quick
def test_oracles_keep_their_share_and_put_the_model_back(seed):
    # float64: where float32 has bf16 products, FFNs that are replaced take them
    model, text = tiny_llama().double(), torch.randint(256, (8, 32))
    seen = []

    def watched(mask):
        def note(hidden, strength):
            mask(hidden, strength)
            seen.append((hidden != 0).double().mean().item())

        return note

    with torch.no_grad():
        whole = model(text).logits
        with masked_ffns(model, [lambda hidden, strength: None] * 2):
            torch.testing.assert_close(model(text).logits, whole)
        with masked_ffns(model, [watched(strongest_neurons(0.5))] * 2):
            model(text)
        sparse = dsmoe_ext.calibrate(model, text, expert_size=8, refit=False, progress=False)
        with masked_ffns(model, [watched(mask) for mask in strongest_experts(sparse, 0.5)]):
            model(text)
        assert torch.equal(model(text).logits, whole)
    assert seen == pytest.approx([0.5] * 4, abs=0.02)


@pytest.mark.parametrize(
    ("name", "options", "rows", "tables"),
    [
        ("ladder", ["--tokens", 2048], 5, 1),
        ("static", ["--tokens", 2048, "--shared", "0.25"], 3, 1),
        ("curve", ["--tokens", 2048, "--targets", "0.5"], 3, 1),
        ("tokens", ["--counts", "1024,2048", "--sources", "self,self+builtin"], 5, 1),
        ("cuts", ["--tokens", 2048, "--targets", "0.5"], 4, 1),
        ("cuts", ["--tokens", 2048, "--targets", "0.5", "--steps", 1], 7, 1),
        ("tuned", ["--tokens", 2048, "--steps", "2"], 12, 2),
        ("paper", ["--tokens", 2048, "--steps", "2", "--taus", "0.3,0.7"], 5, 2),
        ("methods", ["--tokens", 2048, "--steps", "2", "--only", "XMoE 8,ReMoE,MoDSE 4"], 17, 1),
    ],
)
def test_commands_go_on_where_they_stopped(tmp_path, name, options, rows, tables):
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "wiki.raw").write_text(" = Valkyria =\n \n" + "A tactical game .\n" * 200)
    arguments = ["experiment", name, "--model", tmp_path / "model", "--windows", 1]
    arguments += ["--wikitext", tmp_path / "wiki.raw", "--out", tmp_path, *options]
    arguments = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    file = tmp_path / f"{name}.jsonl"
    before = file.read_text()
    assert len(before.splitlines()) == rows
    assert ("\n" + result.stdout).count("\n|") == tables * (rows + 2) - (name == "paper")
    assert "| python | prose | WikiText-2 |" in result.stdout
    assert (tmp_path / f"{name}.png").is_file() == (name in ("curve", "cuts", "methods", "paper"))
    again = CliRunner().invoke(app, arguments)
    assert again.stdout == result.stdout and file.read_text() == before
    drawn = (tmp_path / "own_text.jsonl").read_text()
    file.write_text(before.splitlines(keepends=True)[0])
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and (tmp_path / "own_text.jsonl").read_text() == drawn


@pytest.mark.parametrize(
    ("row", "series"),
    [
        ("routed 0.25", "routed"),
        ("XMoE 64 experts @ 0.5", "XMoE 64 experts"),
        ("MoDSE 4 pairs @ 2", "MoDSE 4 pairs"),
        ("top_p, experts of 24, 0.5", "top_p, experts of 24"),
        ("top_p, experts of 24, 0.5, trained", "top_p, experts of 24, trained"),
        ("ReMoE 8 experts", "ReMoE 8 experts"),
    ],
)
def test_points_of_a_curve(row, series):
    assert series_of(row) == series


def test_methods_are_named(tmp_path):
    result = CliRunner().invoke(app, ["experiment", "methods", "--only", "XMoE, Remoe"])
    assert result.exit_code == 2 and "'Remoe'" in result.output


def test_methods_from_scratch(tmp_path):
    arguments = ["experiment", "scratch", "--steps", "3", "--windows", "2", "--seeds", "0,1"]
    arguments += ["--only", "XMoE 8,ReMoE", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    file = tmp_path / "scratch.jsonl"
    before = file.read_text()
    assert [json.loads(line)["what"]["seed"] for line in before.splitlines()] == [0] * 6 + [1] * 6
    cells = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("|")]
    assert cells[0] == ["  ", " builtin ", " python "]
    assert cells[2] == [" dense ", *[" 1.000 ± 0.000 @1.000 "] * 2]
    assert cells[3][0] == " dense, fewer neurons " and cells[3][1].endswith("@0.500 ")
    assert (tmp_path / "scratch.png").is_file()
    again = CliRunner().invoke(app, arguments)
    assert again.stdout == result.stdout and file.read_text() == before
