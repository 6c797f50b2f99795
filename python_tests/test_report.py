"""`dsmoe report`: the page holds what was measured, and needs nothing from outside."""

import re

import pytest
import torch
from typer.testing import CliRunner

import dsmoe_ext
from dsmoe_ext.command_line.app import app
from dsmoe_ext.command_line.text import Text
from dsmoe_ext.report.measure import Findings, measure
from dsmoe_ext.report.page import page
from dsmoe_ext.training.tiny import byte_tokenizer, save_tiny_llama, tiny_llama
from dsmoe_ext.training.usage import watch_usage

pytestmark = pytest.mark.quick


def sparse_llama():
    text = torch.randint(256, (16, 32))
    return dsmoe_ext.calibrate(tiny_llama(), text, expert_size=8, progress=False)


def test_usage_counts_what_the_layers_count(seed):
    model, text = sparse_llama(), torch.randint(256, (3, 20))
    dsmoe_ext.active_fraction(model)
    with watch_usage(model) as usage, torch.no_grad():
        model(text)
    assert usage.experts().shape == usage.shares().shape == (2, 60)
    active = dsmoe_ext.active_fraction(model)
    assert usage.shares().mean(1).tolist() == pytest.approx(active.per_layer)
    edges, shares = usage.histogram(5)
    assert len(edges) == 6 and sum(shares) == pytest.approx(1)
    with torch.no_grad():
        model(text)  # nobody watches any more
    assert usage.experts().shape == (2, 60)


def test_page_of_a_model(seed):
    model = sparse_llama()
    text = Text("a <b> text", torch.randint(33, 120, (2, 24)))
    findings = measure(model, byte_tokenizer(), "name & model", [text])
    assert findings.expert_use.shape == (2, 9) and len(findings.position_share) == 24
    html = page(findings)
    assert "name &amp; model" in html and "a &lt;b&gt; text" in html
    assert len(re.findall("<span", html)) == 48
    assert len(re.findall("<rect", html)) == 18
    assert "Training" not in html
    assert not re.search(r"(src|href)=|url\(|<script", html)


def test_page_with_a_training_log():
    log = [{"step": step, "loss": 3 - step / 10, "active": 0.5} for step in range(1, 5)]
    empty = torch.zeros(2, 3)
    findings = Findings("m", [], ["a"], torch.zeros(1), empty, [0.5, 0.5], torch.zeros(4), log)
    assert "Training" in page(findings) and "Active share of the FFN.</p>" in page(findings)


def test_command(tmp_path, seed):
    sparse_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words " * 60)
    arguments = ["report", tmp_path / "model", "--data", tmp_path / "text.txt", "--window", 32]
    arguments += ["--out", tmp_path / "page.html"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "text.txt" in (tmp_path / "page.html").read_text()
    dense = save_tiny_llama(tmp_path / "dense")
    result = CliRunner().invoke(app, ["report", str(dense)])
    assert result.exit_code == 1 and "is dense" in result.stderr
