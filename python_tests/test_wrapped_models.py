"""Controllers on wrapped models: DDP, DataParallel, torch.compile, accelerate's optimizer."""

import pytest
import torch
import torch.distributed as dist

import dsmoe_ext
from dsmoe_ext.training.tiny import tiny_llama

accelerate = pytest.importorskip("accelerate")

IDS = torch.arange(32).view(2, 16) * 7 % 256


@pytest.fixture(scope="module")
def group():
    """One process that is a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_threshold_controller_on_accelerates_optimizer():
    model = dsmoe_ext.sparsify(tiny_llama(), 6).train()
    controller = dsmoe_ext.ThresholdController(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    controller.attach(optimizer)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    # All experts were active: tau moves by eta (1 - 0.5).
    assert [ffn.threshold.item() for ffn in controller.ffns] == pytest.approx([0.525, 0.525])


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "DataParallel", "compile"])
def test_lambda_controller_on_wrapped_models(group, wrap):
    model = dsmoe_ext.sparsify(tiny_llama(), 6).train()
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = getattr(torch.nn.parallel, wrap)(model)
    controller = dsmoe_ext.LambdaController(wrapped, 0.5, start=1e-8)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    controller.step()
    assert model.config.dsmoe["sparsity_weight"] == pytest.approx(1.2e-8)
