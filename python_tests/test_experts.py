"""experts_implementation="dsmoe" against transformers' own: outputs, gradients, generation,
packing, and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dsmoe_ext  # noqa: F401  registers it
from dsmoe_ext import experts

transformers = pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
LATENT = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
    first_k_dense_replace=0, n_group=2, topk_group=1, kv_lora_rank=16, q_lora_rank=None,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
)  # fmt: skip
# model: changes of its config
FAMILIES = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen2Moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1,
        shared_expert_intermediate_size=24,
    ),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "DeepseekV2": LATENT | dict(topk_method="greedy"),
    "DeepseekV3": LATENT,
    "Glm4Moe": dict(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1,
        first_k_dense_replace=0, n_group=1, topk_group=1, head_dim=8,
    ),
    "GraniteMoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "Ernie4_5_Moe": dict(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=0,
    ),
    "Jamba": dict(
        num_experts=4, num_experts_per_tok=2, expert_layer_offset=0, expert_layer_period=1,
        attn_layer_offset=0, attn_layer_period=1, use_mamba_kernels=False,
    ),
}  # fmt: skip


def make_model(family: str, **changes) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**(SHAPE | FAMILIES[family] | changes))
    return getattr(transformers, f"{family}ForCausalLM")(config)


def run(model: nn.Module, implementation: str, ids: torch.Tensor):
    """Logits and gradients by name."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, seed):
    model = make_model(family).eval()
    modules = [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "act_fn")]
    assert any(
        m.gate_up_proj.dim() == 3 for m in modules if isinstance(m.gate_up_proj, nn.Parameter)
    )
    ids = torch.randint(1, 67, (2, 9))
    logits, gradients = run(model, "eager", ids)
    ours, our_gradients = run(model, "dsmoe", ids)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, wanted in gradients.items():
        error = (our_gradients[name] - wanted).abs().max()
        assert error <= 1e-5 * wanted.abs().max() + 1e-8, name
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)  # batched, packed
    model.set_experts_implementation("eager")
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)


def make_experts(num_experts=4, hidden=24, size=16, dtype=torch.float32) -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=hidden, intermediate_size=size, num_local_experts=num_experts
    )
    config._experts_implementation = "dsmoe"
    module = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    return module


def reference(module, x, index, weights):
    """Every pair on its own, an index that is no expert's adding nothing."""
    y = torch.zeros_like(x)
    for k in range(index.shape[1]):
        rows = []
        for t, e in enumerate(index[:, k].tolist()):
            if e >= module.num_experts:
                rows.append(torch.zeros_like(x[t]))
                continue
            gate, up = (module.gate_up_proj[e] @ x[t]).chunk(2)
            rows.append(weights[t, k] * (module.down_proj[e] @ (module.act_fn(gate) * up)))
        y = y + torch.stack(rows)
    return y


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sentinels_duplicates_and_weights_of_zero(dtype, seed):
    module = make_experts(dtype=dtype)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    index = torch.tensor([[0, 1], [4, 2], [3, 3], [4, 4], [1, 0]])  # 4: of another process
    weights = torch.rand(5, 2, dtype=dtype)
    weights[1, 0] = weights[3] = 0  # sentinels
    weights[4, 1] = 0  # selected, of weight 0
    weights.requires_grad_()
    leaves = [x, weights, *module.parameters()]
    results = []
    for function in (reference, lambda m, *a: m(*a)):
        y = function(module, x, index, weights)
        results.append([y, *torch.autograd.grad(y.square().sum() + y.sum(), leaves)])
    for wanted, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)
    dweights = results[1][2]
    assert dweights[4, 1] != 0 and dweights[3].abs().sum() == 0 and dweights[1, 0] == 0
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x, index, weights), results[0][0].detach())


def change_in_place(module):
    with torch.no_grad():
        module.down_proj.mul_(2)


def change_memory(module):
    module.gate_up_proj.data = module.gate_up_proj.data.flip(0).clone()


def load(module):
    module.load_state_dict({n: t * 3 for n, t in module.state_dict().items()})


def fused_step(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def replace_parameter(module):
    module.down_proj = nn.Parameter(module.down_proj.detach() + 1)


class Add(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.delta = nn.Parameter(torch.randn_like(like) / 10)

    def forward(self, weight):
        return weight + self.delta


def adapt(module):
    parametrize.register_parametrization(module, "gate_up_proj", Add(module.gate_up_proj))


@pytest.mark.quick
@pytest.mark.parametrize(
    "change", [change_in_place, change_memory, load, fused_step, replace_parameter, adapt]
)
def test_packed_weights_follow_changes(change, seed):
    module = make_experts().eval()
    x, index = torch.randn(3, 24), torch.tensor([[0, 1], [2, 3], [1, 2]])
    weights = torch.rand(3, 2)
    with torch.no_grad():
        before = module(x, index, weights)
        assert module in experts._packs
        packed = experts._packs[module][1]
        assert torch.equal(module(x, index, weights), before)
        assert experts._packs[module][1] is packed
    change(module)
    with torch.no_grad():
        after = module(x, index, weights)
        torch.testing.assert_close(after, reference(module, x, index, weights))
    assert not torch.allclose(after, before)
    if change is adapt:
        parametrize.remove_parametrizations(module, "gate_up_proj", leave_parametrized=True)
        with torch.no_grad():
            torch.testing.assert_close(module(x, index, weights), after)


@pytest.mark.quick
def test_packed_weights_are_no_part_of_the_module(seed):
    module = make_experts().eval()
    arguments = torch.randn(3, 24), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    with torch.no_grad():
        module(*arguments)
    names = set(module.state_dict())
    assert names == {"gate_up_proj", "down_proj"}
    other = copy.deepcopy(module)
    assert other not in experts._packs
    pickle.loads(pickle.dumps(other.state_dict()))
    module.train()(*arguments)
    assert module not in experts._packs  # training frees them


@pytest.mark.quick
@pytest.mark.parametrize(
    "dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"]
)
def test_half_types(dtype, bound, seed):
    module = make_experts(hidden=64, size=48)
    x, index = torch.randn(20, 64), torch.randint(0, 4, (20, 2))
    weights = torch.rand(20, 2)
    exact = reference(module.to(dtype).double(), x.to(dtype).double(), index, weights.double())
    y = module.to(dtype)(x.to(dtype), index, weights.to(dtype))
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.quick
def test_no_token(seed):
    module = make_experts()
    x = torch.randn(0, 24, requires_grad=True)
    y = module(x, torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2))
    y.sum().backward()
    assert y.shape == (0, 24) and module.down_proj.grad.abs().sum() == 0


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_into_one_graph(grad, seed):
    module = make_experts()
    arguments = torch.randn(6, 24), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), module(*arguments))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_other_activations(kind, seed):
    module = make_experts(dtype=torch.float64)
    module.act_fn = transformers.activations.ACT2FN[kind]
    arguments = torch.randn(6, 24).double(), torch.randint(0, 4, (6, 2)), torch.rand(6, 2).double()
    torch.testing.assert_close(module(*arguments), reference(module, *arguments))


REFUSED = {
    "a bias": (dict(has_bias=True), "has expert biases"),
    "no gate": (dict(has_gate=False), "experts without a gate projection"),
    "transposed": (dict(is_transposed=True), "transposed expert weights"),
    "interleaved": (dict(is_concatenated=False), "interleaved gate and up weights"),
    "a norm": (dict(has_post_expert_norm=True), "a norm behind each expert"),
    "quick_gelu": (
        dict(act_fn=transformers.activations.ACT2FN["quick_gelu"]),
        "the activation Quick",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changes, message = REFUSED[name]
    module = make_experts()
    for attribute, value in changes.items():
        setattr(module, attribute, value)
    with pytest.raises(NotImplementedError, match=message):
        module(torch.randn(1, 24), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


def test_gpt_oss_is_refused():
    config = transformers.GptOssConfig(**SHAPE, num_local_experts=4, head_dim=8)
    model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation("dsmoe")
    with pytest.raises(NotImplementedError, match=r'GptOssExperts has .* use "grouped_mm"'):
        model(torch.ones(1, 3, dtype=torch.long))


def test_saved_and_opened(tmp_path, seed):
    model = make_model("Mixtral").eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(1, 67, (2, 9))
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="dsmoe"
    )
    assert opened.config._experts_implementation == "dsmoe"
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
