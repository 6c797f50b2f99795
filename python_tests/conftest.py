import os
import random
import sys
from pathlib import Path

import pytest
import torch

# By default an eighth of the machine's memory: tests of the bound need a small one.
os.environ.setdefault("DSMOE_KEPT_BYTES", str(512 * 2**20))

# The tests are for the installed package. `python -m pytest` puts the working directory first on
# the path, where the source folder of the same name would hide it.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


@pytest.fixture
def seed() -> int:
    """A new seed every run, shown with a failure; DSMOE_SEED in the environment repeats it."""
    value = int(os.environ.get("DSMOE_SEED", random.SystemRandom().randrange(2**31)))
    print(f"DSMOE_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def make_llama():
    """Builds small dense LLaMAs with random weights, large enough that every FFN matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes) -> LlamaForCausalLM:
        fields = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
        fields |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
        fields |= dict(initializer_range=0.2, pad_token_id=0)
        return LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()

    return make


@pytest.fixture
def make_sparse(make_llama):
    """A converted model whose routers are random, so that about half of the pairs are active."""
    import dsmoe_ext

    def make(num_experts=4, **options):
        llama = make_llama(**options.pop("llama", {}))
        model = dsmoe_ext.convert_llama(llama, num_experts, **options)
        with torch.no_grad():
            for ffn in model.modules():
                if isinstance(ffn, dsmoe_ext.DSMoEFFN):
                    ffn.router.weight.normal_(std=0.3)
                    if ffn.router.bias is not None:
                        ffn.router.bias.normal_(std=0.3)
        return model

    return make
