"""Dense against sparse, interleaved in one process: evaluation and decoding."""

import time
from typing import TYPE_CHECKING, Any

import torch

from ..training.measure import generate, inference_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 3
NEW_TOKENS = 32
WINDOWS = 2


@torch.no_grad()
def measure_speed(
    dense: "PreTrainedModel", sparse: "PreTrainedModel", windows: torch.Tensor, prompt: torch.Tensor
) -> dict[str, Any]:
    """Best tokens/s of each model: {"dense": {...}, "sparse": {...}, "dtype", "threads"}.

    evaluation: logits of whole windows, one at a time. decoding: greedy, KV cache, batch 1.
    Copies in bf16 where the processor computes in it; the sparse one with packed weights.
    """
    models = {"dense": inference_copy(dense), "sparse": inference_copy(sparse)}
    best = {name: {"evaluation": 0.0, "decoding": 0.0} for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            ids = windows[:WINDOWS]
            start = time.perf_counter()
            for row in ids:
                model(input_ids=row[None], use_cache=False)
            rate = ids.numel() / (time.perf_counter() - start)
            best[name]["evaluation"] = max(best[name]["evaluation"], rate)
            new = generate(model, prompt, NEW_TOKENS, min_new_tokens=NEW_TOKENS)
            best[name]["decoding"] = max(best[name]["decoding"], new.tokens_per_second)
    dtype = str(models["dense"].dtype).removeprefix("torch.")
    return best | {"dtype": dtype, "threads": torch.get_num_threads()}
