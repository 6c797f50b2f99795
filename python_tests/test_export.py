"""torch.export of the sparse FFN, and of a model that holds it."""

import subprocess
import sys

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.decompositions import decompositions
from dsmoe_ext.training.tiny import tiny_llama

TEXT = torch.arange(24 * 64).view(24, 64) * 31 % 256


@pytest.fixture(scope="module")
def model():
    return dsmoe_ext.calibrate(tiny_llama(), TEXT, expert_size=8, progress=False).eval()


def export(ffn, strict=False):
    shapes = {"x": {0: torch.export.Dim("T", min=2)}}
    x = torch.randn(5, ffn.hidden_size)
    return torch.export.export(ffn, (x,), dynamic_shapes=shapes, strict=strict)


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


class Logits(torch.nn.Module):
    """A model as AOTInductor wants it: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def program(model):
    shapes = ({1: torch.export.Dim("L", min=2, max=128)},)
    with torch.no_grad():
        return torch.export.export(
            Logits(model), (torch.arange(16)[None],), dynamic_shapes=shapes, strict=False
        )


OPEN = """
import sys, torch
program = torch.export.load("plain.pt2").module()
torch.save(program(torch.arange(40)[None]), "logits.pt")
assert "dsmoe_ext" not in sys.modules
"""


def test_decomposed_program_needs_no_package(model, program, tmp_path):
    plain = program.run_decompositions(decompositions())
    assert not [node for node in plain.graph.nodes if "dsmoe" in str(node.target)]
    torch.export.save(plain, tmp_path / "plain.pt2")
    subprocess.run([sys.executable, "-c", OPEN], check=True, cwd=tmp_path)
    with torch.no_grad():
        want = Logits(model)(torch.arange(40)[None])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want)


def test_aot_inductor(model, program, tmp_path):
    """Compiled ahead of time with the ops in it, for any length."""
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    run = torch._inductor.aoti_load_package(package)
    for length in (16, 40):
        ids = torch.arange(length)[None]
        with torch.no_grad():
            torch.testing.assert_close(run(ids), Logits(model)(ids))


@pytest.mark.parametrize("method", ["threshold", "top_p", "top_k", "relu"])
@pytest.mark.parametrize("gates", ["scores", "binary"])
def test_decompositions_are_the_reference(method, gates, seed):
    """Every method, unequal experts, a shared one."""
    options = dict(method=method, gates=gates, router_init="paper", threshold=0.4)
    ffn = dsmoe_ext.DSMoEFFN(16, 24, expert_sizes=[3, 10, 7], shared_size=4, **options).eval()
    x = torch.randn(9, 16)
    program = export(ffn).run_decompositions(decompositions())
    assert not [node for node in program.graph.nodes if "dsmoe" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), ffn(x))
