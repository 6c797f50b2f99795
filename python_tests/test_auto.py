"""transformers' models know the key in config.json as soon as dsmoe_ext is imported."""

import subprocess
import sys

import pytest

import dsmoe_ext


def test_import_order(make_llama, tmp_path):
    """`import dsmoe_ext` alone teaches transformers, at any time, and imports nothing heavy."""
    pytest.importorskip("transformers")
    dsmoe_ext.convert_llama(make_llama()).save_pretrained(tmp_path)
    orders = [
        "import dsmoe_ext; assert 'transformers' not in sys.modules; import transformers",
        "import dsmoe_ext; from transformers import LlamaForCausalLM",
        "from transformers import LlamaForCausalLM; import dsmoe_ext",
    ]
    processes = []
    for order in orders:
        code = f"""
import sys
{order}
assert 'dsmoe_ext.models.adopt' not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
assert type(model.model.layers[0].mlp).__name__ == 'DSMoEFFN', model
"""
        processes.append(subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path))
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_import_without_transformers(tmp_path):
    code = """
import sys
sys.modules['transformers'] = None
import dsmoe_ext, torch
dsmoe_ext.DSMoEFFN(8, 16, 4)(torch.randn(3, 8))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
