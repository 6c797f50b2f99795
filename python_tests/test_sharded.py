"""FSDP2, offloading, casts: routers stay float32, buffers whole, nothing is read unloaded."""

import subprocess
import sys

import pytest
import torch

import dsmoe_ext

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FSDP2 = """
import copy, sys, torch, torch.distributed as dist
from types import SimpleNamespace
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
import dsmoe_ext
from dsmoe_ext.training.tiny import tiny_llama

torch.manual_seed(0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = dsmoe_ext.sparsify(tiny_llama().bfloat16(), 6, router_init="paper").train()
for layer in model.model.layers:
    layer.mlp.set_threshold(0.4)
ids = torch.randint(0, 256, (2, 16))
want = copy.deepcopy(model)(input_ids=ids, labels=ids).loss
full = copy.deepcopy(model.state_dict())
dsmoe_ext.shard_routers(model, mesh=mesh)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=True), model, full)
for name, value in model.state_dict().items():
    assert torch.equal(value.full_tensor(), full[name]) and value.dtype == full[name].dtype, name
loss = model(input_ids=ids, labels=ids).loss
torch.testing.assert_close(loss, want)
loss.backward()
assert model.model.layers[0].mlp.router.weight.grad.dtype == torch.float32
dist.destroy_process_group()
"""


def test_fsdp2_with_bf16_weights(tmp_path):
    """Float32 routers beside bf16 weights, and accelerate's way of loading a full state dict."""
    subprocess.run([sys.executable, "-c", FSDP2], check=True, cwd=tmp_path)


@pytest.fixture
def folder(make_sparse, tmp_path, seed):
    make_sparse(shared_size=8, threshold=0.4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloaded(folder, tmp_path, offload_buffers):
    """One layer on disk: the same logits, the same folder saved; what needs it whole says so."""
    auto, ids = transformers.AutoModelForCausalLM, torch.randint(1, 67, (2, 9))
    whole = auto.from_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = auto.from_pretrained(
        folder,
        device_map=places | {"model.layers.2": "disk"},
        offload_folder=tmp_path / "disk",
        offload_buffers=offload_buffers,
    )
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for refused in (dsmoe_ext.merge, dsmoe_ext.pack):
        with pytest.raises(RuntimeError, match="offload"):
            refused(model)


def test_parameters_cast_one_by_one(make_sparse, seed):
    """As DeepSpeed's bf16 engine does, routers included: packed or not, the same logits."""
    model, ids = make_sparse().eval(), torch.randint(1, 67, (2, 9))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(dsmoe_ext.pack(model)(ids).logits, want, atol=0.05, rtol=0.05)


def test_made_in_inference_mode(folder):
    with torch.inference_mode():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    dsmoe_ext.set_threshold(model, 0.3)
    assert model.model.layers[0].mlp.next_draw() == 0
    dsmoe_ext.ThresholdController(model, 0.3).step()
