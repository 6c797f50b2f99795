"""A whole model, dense in transformers against sparse: decoding, prefill, training.

The weights are random unless a model is named: speed needs only the shape. Routers are random too
(router_init="paper"), and every layer's threshold is set so that the wanted share of the FFN is
active; which experts run then varies from token to token as in a trained model.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dsmoe_ext.benchmarks.timing import Timing, interleaved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = {
    "smollm2-135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "tinyllama-1.1b": dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
}
LAYOUTS = ("equal", "calibrated")
CONTEXT = 64  # tokens in the KV cache while decoding


def dense_model(shape: str, dtype: torch.dtype) -> "PreTrainedModel":
    """A LlamaForCausalLM of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight.data.fill_(1.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    return model


def sparse_model(
    dense: "PreTrainedModel", layout: str, active: float, ste: str
) -> "PreTrainedModel":
    """The dense model converted: 8 equal experts, or as calibrate() lays them out."""
    from dsmoe_ext.convert import sparsify

    intermediate_size = dense.config.intermediate_size
    shared_size = intermediate_size // 4 if layout == "calibrated" else 0
    num_experts = (intermediate_size - shared_size) // 16 if layout == "calibrated" else 8
    model = sparsify(
        copy.deepcopy(dense),
        num_experts,
        shared_size=shared_size,
        gates="binary" if layout == "calibrated" else "scores",
        router_init="paper",
        ste=ste,
    )
    hold_active(model, active)
    return model


@torch.no_grad()
def hold_active(model: "PreTrainedModel", active: float) -> None:
    """Sets every layer's threshold so that this share of its FFN is active on random tokens."""
    from dsmoe_ext.layers import ffn_layers

    for ffn in ffn_layers(model):
        sample = torch.randn(512, ffn.hidden_size).to(model.device, model.dtype)
        scores = ffn.router(sample).sigmoid()
        routed = (active * ffn.intermediate_size - ffn.shared_size) / (
            ffn.intermediate_size - ffn.shared_size
        )
        ffn.threshold.fill_(scores.float().flatten().quantile(1 - routed).item())


def prefill(model: "PreTrainedModel", ids: torch.Tensor) -> Callable[..., Any]:
    """Logits of a whole window."""
    return lambda: model(input_ids=ids, use_cache=False)


def decode(model: "PreTrainedModel", ids: torch.Tensor) -> Callable[..., Any]:
    """One more token after CONTEXT tokens in the KV cache."""
    cache = model(input_ids=ids[:, :CONTEXT], use_cache=True).cache

    def step() -> Any:
        model(input_ids=ids[:, :1], cache=cache, use_cache=True)
        cache.crop(-1)

    return step


def decode_compiled(model: "PreTrainedModel", ids: torch.Tensor) -> Callable[..., Any]:
    """The same as one compiled graph, over a cache of fixed size with room for as many more."""
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=2 * CONTEXT)
    model(input_ids=ids[:, :CONTEXT], cache=cache, use_cache=True)
    compiled = torch.compile(model, backend="dsmoe", fullgraph=True, dynamic=False)

    def step() -> Any:
        compiled(input_ids=ids[:, :1], cache=cache, use_cache=True)
        cache.crop(-1)

    return step


def train_step(model: "PreTrainedModel", ids: torch.Tensor) -> Callable[..., Any]:
    """Loss and every gradient, no optimiser."""

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


TASKS = {
    "decode": decode,
    "decode-compiled": decode_compiled,
    "prefill": prefill,
    "train": train_step,
}


@dataclass(frozen=True)
class ModelRow:
    """One task: times of dense and sparse, and the share of the FFN that was active."""

    task: str
    num_tokens: int
    dense: Timing
    sparse: Timing
    active: float


def measure(
    dense: "PreTrainedModel",
    sparse: "PreTrainedModel",
    tasks: list[str],
    num_tokens: int,
    budget: float,
) -> Iterator[ModelRow]:
    """Yields a ModelRow per task of TASKS. Both ways of decoding are timed in turn."""
    from dsmoe_ext.layers import active_fraction, ffn_layers

    device = dense.device
    ids = torch.randint(dense.config.vocab_size, (1, num_tokens)).to(device)
    for kind, group in itertools.groupby(tasks, lambda task: task.partition("-")[0]):
        same, train = list(group), kind == "train"
        for model in (dense, sparse):
            model.train(train)
        if not train and device.type == "cpu":
            for ffn in ffn_layers(sparse):
                ffn.pack()
        active_fraction(sparse)
        with torch.set_grad_enabled(train):
            methods = {
                f"{task} {name}": [TASKS[task](model, ids)]
                for task in same
                for name, model in (("dense", dense), ("sparse", sparse))
            }
            timing = interleaved(methods, budget * len(same), device.type)
        count = 1 if kind == "decode" else num_tokens
        active = active_fraction(sparse).mean
        for task in same:
            yield ModelRow(task, count, timing[f"{task} dense"], timing[f"{task} sparse"], active)
