"""What a model costs to run: active parameters, decoding speed, and a sweep of thresholds."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..layers import find_ffns
from .evaluate import autocast, supports_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_parameters(model: "PreTrainedModel") -> int:
    """All parameters, tied ones once."""
    codes = sum(ffn.num_expert_weights for ffn in find_ffns(model) if ffn.experts is not None)
    return sum(p.numel() for p in model.parameters()) + codes


def active_parameters(model: "PreTrainedModel", active_per_layer: list[float]) -> float:
    """Share of all parameters (tied ones once, routers included) that a token uses on average.

    Everything outside the FFN counts as used, of each FFN its measured share.
    """
    total = num_parameters(model)
    idle = 0.0
    for ffn, active in zip(find_ffns(model), active_per_layer, strict=False):
        idle += ffn.num_expert_weights * (1.0 - active)
    return 1.0 - idle / total


def ready_for_inference(model: "PreTrainedModel") -> Any:
    """The model in evaluation mode, its FFN weights packed as the CPU kernels read them fastest."""
    model.eval()
    for layer in find_ffns(model):
        if layer.threshold.device.type == "cpu":
            layer.pack()
    return model


def inference_copy(model: "PreTrainedModel") -> Any:
    """A copy as it would be used here: in bf16 where the processor computes in it, packed."""
    device = next(model.parameters()).device
    dtype = torch.bfloat16 if supports_bf16(device) else torch.float32
    return ready_for_inference(copy.deepcopy(model).to(dtype))


@contextlib.contextmanager
def threshold(model: "PreTrainedModel", value: float) -> Iterator[None]:
    """Every layer's threshold (k, prefix: the method's knob) at `value` inside the block, as it was
    afterwards."""
    layers = find_ffns(model)
    before = [layer.knob for layer in layers]
    for layer in layers:
        layer.turn(value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.turn(old)


@dataclass(frozen=True)
class Generation:
    """New token ids [N] of one prompt, and how fast they came."""

    ids: list[int]
    prefill_seconds: float
    decode_seconds: float  # of num_steps steps behind the first token, and behind compiling
    num_steps: int

    @property
    def tokens_per_second(self) -> float:
        return self.num_steps / max(self.decode_seconds, 1e-9)


class _Clock:
    """A streamer of generate() that notes when tokens come and passes them on."""

    def __init__(self, prompt_length: int, on_token: Callable[[int], None] | None = None):
        self.times: list[float] = []
        self._skip, self._on_token = True, on_token

    def put(self, value: torch.Tensor) -> None:
        if self._skip:  # generate() hands over the prompt first
            self._skip = False
            return
        self.times.append(time.perf_counter())
        if self._on_token:
            self._on_token(int(value.view(-1)[0]))

    def end(self) -> None:
        pass


@contextlib.contextmanager
def _own_generation_config(model: "PreTrainedModel") -> Iterator[None]:
    """generate() as it is called: of the model's own settings only its special tokens count.

    generate() fills all that a call leaves open from them: beams, penalties, stop strings, caches.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    pad = own.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=0 if pad is None else pad,
    )
    try:
        yield
    finally:
        model.generation_config = own


def _step_compiler() -> Any:
    """One graph for a step of decoding; transformers compiles on GPUs alone unless it is told."""
    from transformers import CompileConfig

    from ..compile_backend import backend

    config = CompileConfig(backend=backend, mode="default", fullgraph=True, dynamic=False)
    config._compile_all_devices = True
    return config


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    min_new_tokens: int | None = None,
    bf16: bool = False,
    compiled: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continues ids [1,L] with a KV cache; greedy at temperature 0, else seeded sampling.

    compiled: the cache has a fixed size, and torch.compile makes one graph of a step.
    """
    was_training = model.training
    model.eval()
    ids = ids.to(next(model.parameters()).device)
    clock = _Clock(ids.shape[1], on_token)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if compiled:
        options |= {"cache_implementation": "static", "compile_config": _step_compiler()}
    start = time.perf_counter()
    try:
        with autocast(ids.device, bf16), _own_generation_config(model):
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                use_cache=True,
                streamer=clock,
                **options,
            )
    finally:
        model.train(was_training)
    times = clock.times or [time.perf_counter()]
    prefill_seconds = times[0] - start
    if compiled:  # the second token waits for the compiler
        times = times[1:] or times
    new = output[0, ids.shape[1] :].tolist()
    return Generation(new, prefill_seconds, times[-1] - times[0], len(times) - 1)
