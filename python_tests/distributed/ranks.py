"""Run as `python ranks.py FOLDER CHECK:WORLD ...`: forks WORLD processes for each check, which talk
by Gloo. Every rank computes the whole on its own as well, and compares.

One import serves all ranks and checks, so that a check takes a second. Exit status 0: every rank is
content; otherwise the checks that failed stand in the last line.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dsmoe_ext import distributed, ops, reference, sparsify
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.routers import router_class
from dsmoe_ext.testing import Case, magnitudes, random_case
from dsmoe_ext.training.tiny import tiny_llama

HIDDEN = 16


def split(world: int, sizes: list[int], by_rows: bool) -> list[int]:
    """Experts per rank: equally many, or as the sizes come."""
    if not by_rows:
        return [len(sizes) // world + (rank < len(sizes) % world) for rank in range(world)]
    return {2: [2, 6], 4: [1, 2, 0, 5]}[world]  # one rank owns nothing


def tokens_of(rank: int, world: int, ragged: bool) -> slice:
    """Rank's tokens of 24: equally many, or as unequal as can be: rank 0 has none."""
    bounds = [24 * r // world for r in range(world + 1)]
    if ragged:
        bounds[1] = 0
    return slice(bounds[rank], bounds[rank + 1])


def run_whole(case: Case) -> dict:
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs()[:5]]
    y = reference.sparse_ffn(*leaves, case.expert_offsets, grad_weight=case.grad_weight)
    names = ("x", "gates", "gate_proj", "up_proj", "down_proj_t")
    return {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y, leaves, case.dy)))  # noqa: B905


def run_parallel(case: Case, mesh, experts_per_rank, part: slice, **options) -> dict:
    sizes = case.expert_offsets.diff().tolist()
    experts = distributed.ParallelExperts(
        case.inputs()[2:5], sizes, experts_per_rank, mesh, average=False, **options
    )
    x, gates = (t[part].clone().requires_grad_() for t in (case.x, case.gates))
    weight = None if case.grad_weight is None else case.grad_weight[part]
    y = experts(x, gates, weight)
    y.backward(case.dy[part])
    result = {"y": y.detach(), "x": x.grad, "gates": gates.grad}
    for name, parameter in experts.named_parameters():
        gradient = parameter.grad
        result[name] = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    own = experts.own_experts
    rows = slice(int(case.expert_offsets[own.start]), int(case.expert_offsets[own.stop]))
    places = dict.fromkeys(("y", "x", "gates"), part)
    return {name: (value, places.get(name, rows)) for name, value in result.items()}


def check_ffn(mesh, rank, world, folder):
    """Values and gradients of every layout, both ways of exchange."""
    layouts = [
        ([4] * 8, False),
        ([9, 1, 3, 8, 2, 2, 6, 5], True),
        ([5, 0, 3, 7, 1, 4, 4, 8], False),
    ]
    for seed, (sizes, by_rows) in enumerate(layouts):
        for ragged in (False, True):
            for exact_ste in (False, True):
                case = random_case(seed, 24, HIDDEN, sizes, active=0.3, exact_ste=exact_ste)
                case.gates[:, 1] = 0  # an expert without tokens
                case.gates[20] = 0  # a token without experts
                part = tokens_of(rank, world, ragged)
                per_rank = split(world, sizes, by_rows)
                for ranks_per_node in (world, world // 2):
                    options = dict(ranks_per_node=ranks_per_node)
                    compare(case, run_parallel(case, mesh, per_rank, part, **options))
    case = random_case(9, 24, HIDDEN, [4] * 8, dtype=torch.float64)
    part, per_rank = tokens_of(rank, world, True), split(world, [4] * 8, False)
    compare(case, run_parallel(case, mesh, per_rank, part))


def compare(case: Case, got: dict) -> None:
    exact = run_whole(case.to(torch.float64))
    sizes = magnitudes(case)
    for name, (value, rows) in got.items():
        bound = 8 * torch.finfo(case.x.dtype).eps * sizes[name if name == "y" else f"d{name}"]
        error = (value.double() - exact[name][rows]).abs()
        assert (error <= bound[rows]).all(), f"{name} {case.x.dtype}: error {error.max():.3g}"


def check_gather(mesh, rank, world, folder):
    """All tokens everywhere: chosen between nodes, with the same results."""
    case = random_case(3, 24, HIDDEN, [4] * 8, active=1.0)
    part, per_rank = tokens_of(rank, world, False), split(world, [4] * 8, False)
    experts = distributed.ParallelExperts(
        case.inputs()[2:5], [4] * 8, per_rank, mesh, ranks_per_node=world // 2
    )
    everything = torch.full((world, world), 24 // world)
    assert experts.prefers_gather(case.x[part], [24 // world] * world, everything) == (world > 2)
    compare(case, run_parallel(case, mesh, per_rank, part, ranks_per_node=world // 2))


def check_bits(mesh, rank, world, folder):
    """The same bits in every run; and a DTensor of the whole [I,H] where the parts are even."""
    case = random_case(4, 24, HIDDEN, [4] * 8)
    part, per_rank = tokens_of(rank, world, False), split(world, [4] * 8, False)
    first, again = (run_parallel(case, mesh, per_rank, part) for _ in range(2))
    assert all(torch.equal(first[name][0], again[name][0]) for name in first)
    experts = distributed.ParallelExperts(case.inputs()[2:5], [4] * 8, per_rank, mesh)
    assert torch.equal(experts.gate_proj.full_tensor(), case.gate_proj)
    uneven = distributed.ParallelExperts(
        case.inputs()[2:5], [9, 1, 3, 8, 2, 2, 6, 1], split(world, [1] * 8, True), mesh
    )
    assert not isinstance(uneven.gate_proj, DTensor)


class Small(torch.nn.Module):
    """A norm, a router and experts, twice; the whole one (mesh None) has them in one piece."""

    def __init__(self, mesh, experts_per_rank, sizes):
        super().__init__()
        torch.manual_seed(0)
        self.sizes, self.blocks = sizes, torch.nn.ModuleList()
        for _ in range(2):
            router = router_class("top_k")(HIDDEN, sizes)
            weights = torch.randn(3, sum(sizes), HIDDEN) / 4
            if mesh is None:
                experts = torch.nn.ParameterList(weights.unbind())
            else:
                experts = distributed.ParallelExperts(weights, sizes, experts_per_rank, mesh)
            norm = torch.nn.RMSNorm(HIDDEN)
            block = dict(norm=norm, router=router, experts=experts)
            self.blocks.append(torch.nn.ModuleDict(block))

    def forward(self, x):
        for block in self.blocks:
            inner = block["norm"](x)
            gates = block["router"].route(inner).gates
            experts = block["experts"]
            if isinstance(experts, torch.nn.ParameterList):
                offsets = torch.tensor([0, *self.sizes]).cumsum(0).int()
                x = x + ops.sparse_ffn(inner, gates, *experts, offsets)
            else:
                x = x + experts(inner, gates)
        return x


def training(model, wrapped, part, steps=3, after=None):
    """Losses and the model after some AdamW steps on the same 24 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for step in range(steps):
        x, goal = torch.randn(2, 24, HIDDEN, generator=generator)
        loss = (wrapped(x[part]) - goal[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if after:
            after(step, optimizer)
    return torch.stack(losses), optimizer


def check_training(mesh, rank, world, folder):
    """DDP and FSDP2 around it, equal and unequal experts: losses and weights as in one process."""
    part = tokens_of(rank, world, False)
    for sizes, by_rows in (([4] * 8, False), ([9, 1, 3, 8, 2, 2, 6, 5], True)):
        whole = Small(None, None, sizes)
        want, _ = training(whole, whole, slice(None))
        for kind in ("ddp", "fsdp"):
            model = Small(mesh, split(world, sizes, by_rows), sizes)
            own = {p for m in model.modules() if isinstance(m, distributed.ParallelExperts) for p in m.parameters()}  # fmt: skip # noqa: E501
            if kind == "ddp":
                names = [n for n, p in model.named_parameters() if p in own]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
                wrapped = DistributedDataParallel(model)
            else:
                wrapped = fully_shard(model, mesh=mesh, ignored_params=own)
            losses, _ = training(model, wrapped, part)
            dist.all_reduce(losses)
            torch.testing.assert_close(losses / world, want, rtol=1e-5, atol=1e-6)
            for block, reference_block in zip(model.blocks, whole.blocks, strict=True):
                got = block["norm"].weight
                got = got.full_tensor() if isinstance(got, DTensor) else got
                torch.testing.assert_close(
                    got, reference_block["norm"].weight, rtol=1e-4, atol=1e-5
                )


def check_save(mesh, rank, world, folder):
    """Writes a checkpoint, and what the next two losses are, for check_load."""
    sizes = [9, 1, 3, 8, 2, 2, 6, 5]
    model = Small(mesh, split(world, sizes, True), sizes)
    names = [n for n, _ in model.named_parameters() if "experts" in n]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)

    def after(step, optimizer):
        if step == 1:
            distributed.save(folder, 2, model, optimizer)

    wrapped = DistributedDataParallel(model)
    losses, _ = training(model, wrapped, tokens_of(rank, world, False), 4, after)
    dist.all_reduce(losses)
    if rank == 0:
        torch.save(losses / world, Path(folder) / "losses.pt")
        (Path(folder) / "step-9.part").mkdir()  # a half-written one, which nobody reads


def check_load(mesh, rank, world, folder):
    """The checkpoint of another number of ranks goes on as if nothing had happened."""
    sizes = [9, 1, 3, 8, 2, 2, 6, 5]
    model = Small(mesh, split(world, sizes, False), sizes)
    names = [n for n, _ in model.named_parameters() if "experts" in n]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    step, path = distributed.newest(folder)
    assert step == 2

    def after(step, optimizer):
        if step == 1:
            distributed.load(path, model, optimizer)

    wrapped = DistributedDataParallel(model)
    losses, _ = training(model, wrapped, tokens_of(rank, world, False), 4, after)
    dist.all_reduce(losses)
    torch.testing.assert_close((losses / world)[2:], torch.load(Path(folder) / "losses.pt")[2:])


def sparse_model():
    """A tiny LLaMA with a shared expert and unequal routed ones, about half of the pairs on."""
    torch.manual_seed(3)
    dense = tiny_llama(intermediate_size=48)
    model = sparsify(dense, expert_sizes=[9, 1, 12, 8, 2, 8], shared_size=8, ste="exact")
    with torch.no_grad():
        for ffn in ffn_layers(model):
            torch.nn.init.normal_(ffn.router.weight, std=0.3)
            ffn.permutation.copy_(torch.randperm(48))
    return model


def gradients(model, ids, scale=1.0):
    model.zero_grad()
    (model(ids, labels=ids).loss * scale).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_model(mesh, rank, world, folder):
    """A converted model over ranks: logits, gradients, and the whole again to the bit; saved for
    check_model_load. Equal texts on all ranks, so that means over ranks are those of one."""
    ids = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(1))
    one = sparse_model()
    want, wanted = one(ids).logits, gradients(one.train(), ids)
    plans = [[e for e in range(6) if e % world == r] for r in range(world)]
    for plan in (None, [plans[::-1]] * len(ffn_layers(one))):
        model = distributed.parallelize(sparse_model(), mesh, plan)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        got = gradients(model.train(), ids)
        for name, gradient in got.items():
            if ".parallel.routed." not in name and ".parallel.shared." not in name:
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)
        distributed.save(folder, 7, model.eval())
        again = distributed.whole(model)
        for name, value in one.state_dict().items():
            if name.endswith("draw_counter"):
                continue
            assert torch.equal(again.state_dict()[name], value), name
    if rank == 0:
        torch.save(want.detach(), Path(folder) / "logits.pt")


def check_model_load(mesh, rank, world, folder):
    """Another number of ranks reads it."""
    model = distributed.parallelize(sparse_model(), mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    distributed.load(distributed.newest(folder)[1], model)
    ids = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(1))
    want = torch.load(Path(folder) / "logits.pt")
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def replicated_but_for_experts(mesh, world):
    """For DistributedDataParallel: eight experts of four neurons, shared out among the ranks."""
    sizes = [4] * 8
    model = Small(mesh, split(world, sizes, False), sizes)
    names = [n for n, _ in model.named_parameters() if "experts" in n]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return model


def check_kill(mesh, rank, world, folder):
    """A rank dies at a random step; the others must say so and end. See test_distributed.py."""
    generator = random.Random(int(os.environ["DSMOE_SEED"]))
    victim, moment = generator.randrange(world), generator.randrange(1, 40)
    where = generator.choice(["compute", "save"])
    model = replicated_but_for_experts(mesh, world)
    print(f"rank {victim} dies in {where} after step {moment}", flush=True)

    def after(step, optimizer):
        if rank == victim and step == moment:
            (Path(folder) / "death").write_text(str(time.time()))
        if rank == victim and step == moment and where == "compute":
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 5 == 0 or step == moment:
            if rank == victim and step == moment:
                signal.setitimer(signal.ITIMER_REAL, generator.random() / 50)
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            distributed.save(folder, step, model, optimizer)

    with distributed.ends_clearly():
        wrapped = DistributedDataParallel(model)
        training(model, wrapped, tokens_of(rank, world, False), 60, after)


def check_after_kill(mesh, rank, world, folder):
    """The newest checkpoint of the job that died is whole: training goes on from it."""
    model = replicated_but_for_experts(mesh, world)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    step, path = distributed.newest(folder)
    distributed.load(path, model, optimizer)
    assert all(state["step"] == step + 1 for state in optimizer.state.values())
    losses, _ = training(model, wrapped, tokens_of(rank, world, False), 3)
    assert losses.isfinite().all()
    if rank == 0:
        print(f"goes on after step {step}", flush=True)


def run_ranks(check: str, world: int, folder: str) -> bool:
    """Whether every rank was content."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                distributed.start(
                    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
                )
                mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
                globals()[f"check_{check}"](mesh, rank, world, folder)
                dist.barrier()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # no cleanup that would wait for others
        children.append(child)
    failed = [os.waitpid(child, 0)[1] for child in children]
    Path(folder, "rendezvous").unlink(missing_ok=True)
    return not any(failed)


def main(folder: str, *checks: str) -> int:
    torch.set_num_threads(1)
    failed = []
    for entry in checks:
        check, world = entry.split(":")
        if not run_ranks(check, int(world), folder):
            failed.append(entry)
    print("failed:", *failed if failed else ["none"])
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
