"""dsmoe_ext/gguf.py: a .gguf file is read whole, or refused in one sentence."""

import numpy as np
import pytest
import torch

from dsmoe_ext import model_source as source
from dsmoe_ext.errors import UserError
from dsmoe_ext.training.tiny import byte_tokenizer, tiny_llama

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FIELDS = {
    "context_length": 256,
    "embedding_length": 32,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "vocab_size": 259,
    "rope.dimension_count": 8,
}
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(tie_word_embeddings=False, vocab_size=259).eval()


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest[:-1])]}.weight"


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k matrix in the order of GGUF, where rotated pairs stand side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write(llama, tmp_path, monkeypatch):
    """Writes the tiny model, changed in some way, and opens it as the commands do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write_and_read(skip=(), extra=None, arch="llama", **fields):
        path = tmp_path / "model.gguf"
        writer, vocabulary = gguf.GGUFWriter(path, arch), byte_tokenizer().get_vocab()
        for key, number in (FIELDS | {k.replace("__", "."): v for k, v in fields.items()}).items():
            if number is None:
                continue
            key = key if key.startswith("split") else f"{arch}.{key}"
            kind = {str: "string", int: "uint32", float: "float32"}[type(number)]
            getattr(writer, f"add_{kind}")(key, number)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "Ġt"])
        writer.add_token_types([1] * 256 + [3, 3, 1])
        writer.add_token_merges(["Ġ t"])
        for name, tensor in llama.state_dict().items():
            if "q_proj" in name or "k_proj" in name:
                tensor = halves(tensor, 4 if "q_proj" in name else 2)
            if (name := gguf_name(name)) not in skip:
                writer.add_tensor(name, np.ascontiguousarray(tensor))
        for name, value in (extra or {}).items():
            writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(source.resolve_model(str(path))).eval()

    return write_and_read


@torch.no_grad()
def test_a_whole_file(write, llama):
    torch.testing.assert_close(write()(IDS).logits, llama(IDS).logits)


ONES = np.ones(16, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": ["blk.1.ffn_up.weight"]}, "lacks 1 of.*blk.1.ffn_up.weight first"),
        ({"skip": ["token_embd.weight"]}, "lacks 1 of.*token_embd"),
        ({"split__count": 2}, "one of 2 parts"),
        ({"extra": {"blk.0.attn_v.bias": ONES}}, "1 tensors more, blk.0.attn_v.bias first"),
        ({"extra": {"blk.2.attn_norm.weight": ONES}}, "1 tensors more, blk.2"),
        ({"expert_count": 4}, "llama.expert_count is 4"),
        ({"attention__scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"embedding_length": None}, "lacks the field llama.embedding_length"),
        ({"attention__key_length": 16}, "only part of each head"),
        ({"rope__scaling__type": "longrope"}, "not supported.*longrope"),
        ({"rope__scaling__yarn_beta_fast": 16.0}, "not supported.*yarn_beta_fast"),
        ({"arch": "gpt2"}, "a gpt2 model, not a LLaMA"),
    ],
)
def test_what_is_refused(write, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        write(**change)
    assert list((tmp_path / "cache/dsmoe_ext").iterdir()) == []


def test_rotary_frequencies(write, llama):
    """inv_freq: plain, divided by a factor, and divided one by one as Llama 3's files say."""
    plain = llama.model.rotary_emb.inv_freq
    linear = write(rope__scaling__type="linear", rope__scaling__factor=4.0)
    torch.testing.assert_close(linear.model.rotary_emb.inv_freq, plain / 4)
    older = write(rope__scale_linear=2.0)
    torch.testing.assert_close(older.model.rotary_emb.inv_freq, plain / 2)
    divisors = torch.tensor([1.0, 2.0, 4.0, 8.0])
    llama3 = write(extra={"rope_freqs.weight": divisors.numpy()}).model.rotary_emb
    torch.testing.assert_close(llama3.inv_freq, plain / divisors)
    assert llama3.attention_scaling == 1.0
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    got = write(**yarn, rope__scaling__original_context_length=64)
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    want = tiny_llama(rope_parameters=parameters | {"rope_theta": 1e4}).model.rotary_emb
    torch.testing.assert_close(got.model.rotary_emb.inv_freq, want.inv_freq)
    assert got.model.rotary_emb.attention_scaling == want.attention_scaling > 1
