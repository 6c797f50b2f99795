"""A GGUF's codes taken over: the weights are those that gguf's own reader makes of them."""

import numpy as np
import pytest
import torch

from dsmoe_ext.quantization.gguf import experts_from_gguf
from dsmoe_ext.testing import offsets_of

gguf = pytest.importorskip("gguf")


@pytest.fixture
def written(tmp_path, seed):
    """Writes one layer's FFN of H 64 and I 96, and gives its weights as gguf reads them back."""

    def write(kind: str, down_kind: str | None = None):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        weights = []
        for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            form = gguf.GGMLQuantizationType[down_kind or kind if name == "down" else kind]
            data = gguf.quants.quantize(np.random.default_rng(seed).normal(size=shape), form)
            writer.add_tensor(f"blk.0.ffn_{name}.weight", data, raw_dtype=form)
            weights.append(torch.tensor(gguf.quants.dequantize(data, form)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf", (*weights[:2], weights[2].t())

    return write


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_codes_are_taken_over(kind, written):
    path, weights = written(kind)
    got = experts_from_gguf(path, 0, offsets_of([32, 64])).dequantize()
    for one, other in zip(weights, got, strict=True):
        assert (one - other).abs().max() <= (1e-3 if kind == "Q4_1" else 0) * one.abs().max()


def test_whole_blocks_move(written):
    path, weights = written("Q4_0")
    order = torch.arange(96).view(3, 32)[[2, 0, 1]].flatten()
    got = experts_from_gguf(path, 0, offsets_of([96]), order).dequantize()
    for one, other in zip(weights, got, strict=True):
        assert torch.equal(one[order], other)


def test_what_cannot_be_taken_over(written):
    path, _ = written("Q8_0", "Q4_0")
    with pytest.raises(ValueError, match="differ in type"):
        experts_from_gguf(path, 0, offsets_of([96]))
    path, _ = written("Q5_0")
    with pytest.raises(ValueError, match="type Q5_0 has no codes of ours"):
        experts_from_gguf(path, 0, offsets_of([96]))
    path, _ = written("Q8_0")
    with pytest.raises(ValueError, match="multiples of 32"):
        experts_from_gguf(path, 0, offsets_of([16, 80]))
    with pytest.raises(ValueError, match="tears blocks"):
        experts_from_gguf(path, 0, offsets_of([96]), torch.arange(96).flip(0))
