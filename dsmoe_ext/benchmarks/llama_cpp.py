"""llama.cpp's decoding beside our FFN, at equal bits and threads, on weights of one GGUF.

llama.cpp runs a TinyLlama-1.1B of random weights twice, whole and with an FFN of 32 neurons: what a
token takes less is its FFN. Ours takes over the codes of all FFNs from the same file, cut
into 8 experts of which 4 are active.

    pip install llama-cpp-python      builds llama.cpp for this processor, some ten minutes
    python -m dsmoe_ext.benchmarks.llama_cpp Q4_0 --threads 1

--as-stored: llama.cpp computes with the weights as the file holds them. Without, it lays them out
anew where it has code for the processor; that for AMX ends in a segmentation fault on some.
"""

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from dsmoe_ext import ops
from dsmoe_ext.benchmarks.machine import processor_name
from dsmoe_ext.benchmarks.model import CONTEXT, SHAPES

SHAPE = SHAPES["tinyllama-1.1b"]
LAYERS, HIDDEN, HEADS = (
    SHAPE[f"{name}"] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
)
KV_HEADS, VOCABULARY = SHAPE["num_key_value_heads"], SHAPE["vocab_size"]
EXPERTS, ACTIVE = 8, 4
DECODED, ROUNDS = 48, 5


def write_model(path: Path, kind: str, intermediate_size: int) -> None:
    """A LLaMA of random weights, norms in float32, all else in Q8_0 or Q4_0. Layers hold the same
    numbers, each in memory of its own: time knows no difference."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")  # of words that nobody will read
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]  # unknown, control, byte, then normal
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    kinds += [1] * (VOCABULARY - len(kinds))
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)

    random = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[kind]

    def codes(rows: int, columns: int) -> np.ndarray:
        weight = random.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        return gguf.quants.quantize(weight, quantization)

    kv_size = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn_q": codes(HIDDEN, HIDDEN), "attn_k": codes(kv_size, HIDDEN),
        "attn_v": codes(kv_size, HIDDEN), "attn_output": codes(HIDDEN, HIDDEN),
        "ffn_gate": codes(intermediate_size, HIDDEN), "ffn_up": codes(intermediate_size, HIDDEN),
        "ffn_down": codes(HIDDEN, intermediate_size),
    }  # fmt: skip
    ones = np.ones(HIDDEN, dtype=np.float32)
    for i in range(LAYERS):
        for name, tensor in layer.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor, raw_dtype=quantization)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", codes(VOCABULARY, HIDDEN), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in llama.cpp; seconds() of a token that is decoded."""

    def __init__(self, path: Path, threads: int, as_stored: bool):
        from llama_cpp import Llama, llama_cpp

        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = not as_stored  # which Llama does not ask for
        with mock.patch.object(llama_cpp, "llama_model_default_params", lambda: params):
            self.model = Llama(
                str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
            )

    def seconds(self) -> float:
        self.model.reset()
        self.model.eval(list(range(300, 300 + CONTEXT)))
        begin = time.perf_counter()
        for token in range(300, 300 + DECODED):  # any: none is read
            self.model.eval([token])
        return (time.perf_counter() - begin) / DECODED


def our_layers(path: Path) -> list[ops.PackedWeights]:
    """Every layer's experts, from the codes in the file."""
    from dsmoe_ext.quantization.gguf import experts_from_gguf

    offsets = torch.arange(EXPERTS + 1, dtype=torch.int32) * (SHAPE["intermediate_size"] // EXPERTS)
    return [ops.pack_quantized(experts_from_gguf(path, i, offsets)) for i in range(LAYERS)]


@torch.no_grad()
def our_seconds(layers: list[ops.PackedWeights]) -> float:
    """The FFNs of all layers for one token, half active."""
    x = torch.randn(1, HIDDEN).bfloat16()
    gates = torch.zeros(LAYERS, 1, EXPERTS)
    for gate in gates:
        gate[0, torch.randperm(EXPERTS)[:ACTIVE]] = 1.0
    begin = time.perf_counter()
    for layer, gate in zip(layers, gates, strict=True):
        ops.sparse_ffn(x, gate, layer)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("Q8_0", "Q4_0"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--as-stored", action="store_true", help="llama.cpp without repacking")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.gguf", Path(folder) / "small.gguf"
        write_model(whole, options.kind, SHAPE["intermediate_size"])
        write_model(small, options.kind, 32)
        layers = our_layers(whole)
        peers = [LlamaCpp(path, options.threads, options.as_stored) for path in (whole, small)]
        rounds = []
        for _ in range(ROUNDS):
            times = [peer.seconds() for peer in peers]
            rounds.append([*times, min(our_seconds(layers) for _ in range(DECODED))])
    token, rest, ours = (min(column) for column in zip(*rounds, strict=True))
    print(
        f"{processor_name()}, {options.threads} thread(s), {options.kind}: llama.cpp "
        f"{1 / token:.1f} tokens/s, its FFN {1e3 * (token - rest):.1f} ms a token; ours at "
        f"{ACTIVE} of {EXPERTS} experts {1e3 * ours:.1f} ms, {ours / (token - rest):.2f} of it; "
        f"with it {1 / (rest + ours):.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
