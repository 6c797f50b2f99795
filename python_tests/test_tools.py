"""Tools that know transformers, not this package: what they compute is what the model computes."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import dsmoe_ext
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.training.measure import generate
from dsmoe_ext.training.tiny import save_tiny_llama


@pytest.fixture
def sparse_folder(tmp_path, seed):
    """A tiny sparse model whose routers are random, with a tokenizer."""
    save_tiny_llama(tmp_path / "dense", seed)
    model = dsmoe_ext.sparsify(tmp_path / "dense", num_experts=4)
    with torch.no_grad():
        for ffn in ffn_layers(model):
            ffn.router.weight.normal_(std=0.3)
    model.save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


HARNESS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

assert "dsmoe_ext" not in sys.modules
harness = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=1)
pairs = json.loads(sys.argv[2])
requests = [Instance("loglikelihood", {}, tuple(pair), 0) for pair in pairs]
print(json.dumps([value for value, _ in harness.loglikelihood(requests)]))
"""


def test_lm_evaluation_harness(sparse_folder):
    pairs = [["The sky is", " blue"], ["One and one", " are two"]]
    command = [sys.executable, "-c", HARNESS, str(sparse_folder), json.dumps(pairs)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=sparse_folder)
    assert result.returncode == 0, result.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(sparse_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(sparse_folder)
    for (context, continuation), got in zip(
        pairs, json.loads(result.stdout.splitlines()[-1]), strict=True
    ):
        first = len(tokenizer(context)["input_ids"])
        ids = torch.tensor(tokenizer(context + continuation)["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        wanted = logs[first - 1 : -1].gather(1, ids[first:, None]).sum().item()
        assert got == pytest.approx(wanted, rel=1e-4)


def test_torchao_takes_the_rest_of_the_model(sparse_folder):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(sparse_folder).eval()
    ids = torch.arange(1, 17)[None]
    before = {name: p.clone() for name, p in model.named_parameters() if ".mlp." in name}
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        quantize_(model, Int8WeightOnlyConfig())
        got = model(input_ids=ids).logits
    assert type(model.model.layers[0].self_attn.q_proj.weight).__name__ != "Parameter"
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.02


def test_pipeline(sparse_folder):
    generator = pipeline("text-generation", str(sparse_folder))
    options = {"max_new_tokens": 8, "do_sample": False}
    text = generator("The sky", return_full_text=False, **options)[0]["generated_text"]
    model = AutoModelForCausalLM.from_pretrained(sparse_folder)
    tokenizer = AutoTokenizer.from_pretrained(sparse_folder)
    inputs = tokenizer("The sky", return_tensors="pt")
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_static_cache_gives_the_same_tokens(sparse_folder, compiled):
    """And one compiled graph, without a break, is a step of it."""
    model = AutoModelForCausalLM.from_pretrained(sparse_folder).eval()
    ids = torch.arange(1, 9)[None]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **options)
    model.pack()
    if compiled:
        got = generate(model, ids, 6, min_new_tokens=6, compiled=True).ids
        assert got == wanted[0, 8:].tolist()
    else:
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), wanted)
