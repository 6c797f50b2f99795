"""The calibration text on its way through the model, one layer at a time.

Two hidden states are carried from layer to layer: that of the dense model, which says what each
layer should give, and that of the model made sparse so far, which is what the next layer will
really see.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from dsmoe_ext.routers import at_least_float32

# Tokens per chunk: temporaries are a few [CHUNK, I] matrices, and GEMMs of this height run at full
# speed.
CHUNK_TOKENS = 4096


class Streams:
    """dense, sparse [N,L,H] float32 (float64 for such a model): the two hidden states.

    After advance(l), both stand behind layer l's attention, in front of its FFN. Then the owner
    adds an FFN output to each (`add`) before the next layer.
    """

    def __init__(self, model: nn.Module, windows: Tensor):
        self.model = model.model
        self.dtype = at_least_float32(model.dtype)
        self.dense = self.model.embed_tokens(windows).to(self.dtype)
        self.sparse = self.dense.clone()
        step = max(1, CHUNK_TOKENS // windows.shape[1])
        self.chunks = [slice(i, i + step) for i in range(0, len(windows), step)]

    def advance(self, layer: nn.Module) -> None:
        """Adds layer's attention output to both states, in place."""
        length = self.dense.shape[1]
        positions = torch.arange(length, device=self.dense.device).unsqueeze(0)
        rotary = self.model.rotary_emb(self.dense, position_ids=positions)
        for state in (self.dense, self.sparse):
            for chunk in self.chunks:
                x = layer.input_layernorm(state[chunk])
                mask = create_causal_mask(
                    config=self.model.config,
                    inputs_embeds=x,
                    attention_mask=None,
                    cache=None,
                    position_ids=positions,
                )
                attended, _ = layer.self_attn(
                    hidden_states=x,
                    attention_mask=mask,
                    position_ids=positions,
                    position_embeddings=rotary,
                )
                state[chunk] += attended

    def in_working_precision(self, layer: nn.Module) -> nn.Module:
        """The layer itself, or a float32 copy of a half-precision one (this layer only)."""
        weight = layer.mlp.gate_proj.weight
        return layer if weight.dtype == self.dtype else copy.deepcopy(layer).to(self.dtype)

    def token_rows(self) -> Iterator[tuple[slice, slice]]:
        """(windows of a chunk, their rows in a [T,...] matrix of all tokens)."""
        num_windows, length = self.dense.shape[:2]
        for chunk in self.chunks:
            yield chunk, slice(chunk.start * length, min(chunk.stop, num_windows) * length)


@contextlib.contextmanager
def quick_matmul() -> Iterator[None]:
    """Lets float32 GEMMs on the CPU take the faster of torch's two libraries; restored afterwards.

    On AMD, oneDNN's float32 GEMM is twice as fast as MKL's and as accurate; this setting selects
    it. With AMX it allows bf16 products, which a regression on this much data does not notice: sums
    stay float32, and the systems are solved in float64. A GPU's setting is left as it is.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
