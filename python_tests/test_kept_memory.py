"""Memory of gradients and activations, kept between calls, and of packed weights
(csrc/binding/kept_memory.cpp)."""

import os
import resource

import pytest
import torch

import dsmoe_ext

NUM_TOKENS, HIDDEN, INTERMEDIATE, EXPERTS = 16, 512, 4096, 4  # each weight gradient: 8 MiB
WEIGHT_BYTES = HIDDEN * INTERMEDIATE * 4
KEPT_BYTES = int(os.environ["DSMOE_KEPT_BYTES"])  # conftest.py

keeps_memory = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="torch has torch_from_blob from 2.11 on"
)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(INTERMEDIATE, HIDDEN, generator=generator).mul_(0.05).requires_grad_()
        for _ in range(3)
    ]
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    gates = torch.rand(NUM_TOKENS, EXPERTS, generator=generator)
    offsets = torch.arange(EXPERTS + 1, dtype=torch.int32) * (INTERMEDIATE // EXPERTS)
    return x, gates, weights, offsets


def gradients(x, gates, weights, offsets, scale=1.0, others=()):
    y = dsmoe_ext.sparse_ffn(x, gates, *weights, *others, offsets)
    return torch.autograd.grad(y, weights, torch.full_like(y, scale))


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_gradients_that_are_held_stay_as_they_are(inputs):
    held = gradients(*inputs)
    copies = [g.clone() for g in held]
    others = gradients(*inputs, scale=2.0)
    for g, copy, other in zip(held, copies, others, strict=True):
        assert torch.equal(g, copy)
        assert torch.equal(other, 2 * copy)
        assert g.data_ptr() != other.data_ptr()


def test_gradients_accumulate(inputs):
    x, gates, weights, offsets = inputs
    once = gradients(*inputs)
    for _ in range(3):
        dsmoe_ext.sparse_ffn(x, gates, *weights, offsets).sum().backward()
    for weight, g in zip(weights, once, strict=True):
        torch.testing.assert_close(weight.grad, 3 * g)


@keeps_memory
def test_packed_weights_are_mapped_by_huge_pages_and_given_back(inputs):
    _, _, weights, offsets = inputs
    before = resident_bytes()
    packed = dsmoe_ext.pack_weights(*weights, offsets)
    assert packed.data.data_ptr() % (2 << 20) < 4096
    assert resident_bytes() - before > 2.5 * WEIGHT_BYTES
    del packed
    assert resident_bytes() - before < WEIGHT_BYTES / 2


@keeps_memory
def test_a_second_step_touches_no_new_pages(inputs):
    for _ in range(2):
        gradients(*inputs)
    before = faults()
    gradients(*inputs)
    assert (faults() - before) * resource.getpagesize() < WEIGHT_BYTES / 10


@keeps_memory
def test_memory_beyond_the_bound_goes_back(inputs):
    held = [gradients(*inputs) for _ in range(30)]  # 720 MiB
    most = resident_bytes()
    del held
    released = most - resident_bytes()
    assert released > 30 * 3 * WEIGHT_BYTES - KEPT_BYTES - 2**26


@keeps_memory
def test_a_block_beyond_the_bound_goes_back():
    x = torch.randn(1, 4096)
    weights = [torch.zeros(36000, 4096, requires_grad=i == 0) for i in range(3)]
    held = gradients(
        x, torch.ones(1, 1), weights[:1], torch.tensor([0, 36000]).int(), others=weights[1:]
    )
    most = resident_bytes()
    del held
    assert most - resident_bytes() > 0.9 * KEPT_BYTES


@keeps_memory
def test_sizes_no_longer_in_use_give_way(inputs):
    x, gates, weights, offsets = inputs
    held = [gradients(*inputs) for _ in range(21)]  # about the bound
    del held
    half = [w.detach()[: INTERMEDIATE // 2].clone().requires_grad_() for w in weights]
    small = (x, gates, half, offsets // 2)
    before = resident_bytes()
    held = [gradients(*small) for _ in range(21)]
    del held
    assert resident_bytes() < before + 2**26


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own(inputs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's pool does not survive a fork
    try:
        want = [g.clone() for g in gradients(*inputs)]
        child = os.fork()
        if child == 0:
            got = gradients(*inputs)
            same = all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
            os._exit(0 if same else 1)
        for g, w in zip(gradients(*inputs), want, strict=True):
            assert torch.equal(g, w)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_other_dtypes_and_shapes(inputs):
    x, gates, weights, offsets = inputs
    want = gradients(*inputs)
    got = gradients(x.bfloat16(), gates, [w.bfloat16() for w in weights], offsets)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == torch.bfloat16 and g.is_contiguous()
