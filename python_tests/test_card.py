"""README.md beside a saved sparse model, and never in place of one that a user wrote."""

import pytest
import torch
from typer.testing import CliRunner

import dsmoe_ext
from dsmoe_ext.command_line.app import app
from dsmoe_ext.files import CARD_MARK
from dsmoe_ext.training.tiny import save_tiny_llama

TEXT = "Every token uses only the experts it needs. " * 200


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return save_tiny_llama(tmp_path / "dense")


def test_commands_say_what_they_measured(folder, tmp_path):
    """The card's figures are those of dsmoe eval on the same windows."""
    from dsmoe_ext.command_line.steps import CARD_WINDOWS

    text, out = tmp_path / "text.txt", tmp_path / "sparse"
    options = ("--data", text, "--window", 64)
    run("calibrate", folder, out, *options, "--tokens", 2048, "--expert-size", 8)
    card = (out / "README.md").read_text()
    assert "| router | threshold, binary gates |" in card
    assert "| target | 0.50 of the feed-forward layers active |" in card
    [row] = [line for line in card.splitlines() if line.startswith("| held out of text.txt |")]
    import json

    shown = run("eval", out, *options, "--limit", CARD_WINDOWS, "--json")
    [measured] = json.loads(shown[shown.index("[") :])
    *_, perplexity, active, _ = (cell.strip() for cell in row.split("|"))
    assert float(perplexity) == pytest.approx(measured["perplexity"], rel=1e-2)
    assert float(active) == pytest.approx(measured["active_ffn"], abs=2e-3)


def test_what_a_card_says_without_a_measurement(tmp_path):
    dsmoe_ext.sparsify(save_tiny_llama(tmp_path / "dense"), 4, shared_size=8).save_pretrained(
        tmp_path / "sparse"
    )
    card = (tmp_path / "sparse/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and CARD_MARK in card
    assert "| experts of a layer | 4 of 22 neurons |" in card
    assert "| always on | 8 of 96 neurons |" in card
    assert "`dsmoe eval` measures" in card


@pytest.mark.parametrize("way", ["save_pretrained", "overwrite"])
def test_a_users_readme_stays(folder, tmp_path, way):
    out = tmp_path / "sparse"
    run("convert", folder, out)
    assert CARD_MARK in (out / "README.md").read_text()
    (out / "README.md").write_text("mine\n")
    if way == "save_pretrained":
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(out).save_pretrained(out)
    else:
        run("convert", folder, out, "--experts", 4, "--overwrite")
    assert (out / "README.md").read_text() == "mine\n"
    with torch.no_grad():
        dsmoe_ext.merge(dsmoe_ext.sparsify(folder)).save_pretrained(out)
    assert (out / "README.md").read_text() == "mine\n"


def test_our_own_card_goes_with_the_model(folder, tmp_path):
    out = tmp_path / "sparse"
    run("convert", folder, out)
    run("merge", out, tmp_path / "merged")
    assert not (tmp_path / "merged/README.md").exists()
    run("convert", folder, out, "--experts", 4, "--overwrite")
    assert "| experts of a layer | 4 of 24 neurons |" in (out / "README.md").read_text()
