"""A saved folder in a program that does not import the package by itself."""

import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dsmoe_ext

OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "trust")
with torch.no_grad():
    logits = model(input_ids=torch.arange(1, 9)[None]).logits
torch.save((logits, type(model).__name__, "dsmoe_ext" in sys.modules), sys.argv[3])
if len(sys.argv) > 4:
    model.save_pretrained(sys.argv[4])
"""


def opened(*arguments, tmp_path):
    command = [
        sys.executable,
        "-c",
        OPEN,
        str(arguments[0]),
        arguments[1],
        str(tmp_path / "out.pt"),
    ]
    command += [str(argument) for argument in arguments[2:]]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    return torch.load(tmp_path / "out.pt")


def test_trusted_code_brings_the_sparse_model(make_sparse, tmp_path, seed):
    model = make_sparse().eval()
    model.save_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(1, 9)[None]).logits
        dense = dsmoe_ext.merge(model)(input_ids=torch.arange(1, 9)[None]).logits
    logits, name, imported = opened(
        tmp_path / "sparse", "trust", tmp_path / "again", tmp_path=tmp_path
    )
    assert (name, imported) == ("LlamaForCausalLM", True)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    logits, _, _ = opened(tmp_path / "again", "trust", tmp_path=tmp_path)  # saved once more there
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    logits, _, imported = opened(tmp_path / "sparse", "not", tmp_path=tmp_path)
    assert not imported
    torch.testing.assert_close(logits, dense)


def test_own_process_and_other_heads(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert model.__class__.__module__.startswith("transformers.")
    assert not hasattr(model.config, "auto_map")
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    head.save_pretrained(tmp_path / "head")
    assert '"AutoModelForSequenceClassification"' in (tmp_path / "head/config.json").read_text()


def test_dense_models_get_no_file(make_sparse, tmp_path):
    make_sparse().save_pretrained(tmp_path / "sparse")
    dsmoe_ext.merge(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")).save_pretrained(
        tmp_path / "dense"
    )
    assert not (tmp_path / "dense/dsmoe_auto.py").exists()
    assert "auto_map" not in (tmp_path / "dense/config.json").read_text()
