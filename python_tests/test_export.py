"""torch.export of the sparse FFN, and of a model that holds it."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.training.tiny import tiny_llama

TEXT = torch.arange(24 * 64).view(24, 64) * 31 % 256


@pytest.fixture(scope="module")
def model():
    return dsmoe_ext.calibrate(tiny_llama(), TEXT, expert_size=8, progress=False).eval()


def export(ffn, strict=False):
    shapes = {"x": {0: torch.export.Dim("T", min=2)}}
    return torch.export.export(ffn, (torch.randn(5, 32),), dynamic_shapes=shapes, strict=strict)


def test_export_for_any_number_of_tokens(model, tmp_path, seed):
    ffn, x = model.model.layers[0].mlp, torch.randn(9, 32)
    want = ffn(x)
    torch.export.save(export(ffn), tmp_path / "ffn.pt2")
    for program in (
        export(ffn),
        export(ffn, strict=True),
        export(ffn).run_decompositions(),
        torch.export.load(tmp_path / "ffn.pt2"),
    ):
        torch.testing.assert_close(program.module()(x), want)


def test_an_exported_program_counts_for_itself(model, seed):
    ffn = model.model.layers[0].mlp
    program = export(ffn).module()
    dsmoe_ext.active_fraction(ffn)
    program(torch.randn(9, 32))
    assert dsmoe_ext.active_fraction(ffn).num_tokens == 0


def test_export_of_a_whole_model(model):
    ids = torch.arange(16)[None]
    program = torch.export.export(model, (ids,), kwargs={"use_cache": False}, strict=False)
    got = program.run_decompositions().module()(ids, use_cache=False).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits)
