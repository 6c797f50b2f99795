"""All sparse FFNs of a model: finding them, moving their thresholds, reading what was active."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dsmoe_ext.ffn import DSMoEFFN
from dsmoe_ext.statistics import active_share


def find_ffns(model: nn.Module) -> list[DSMoEFFN]:
    """The model's DSMoEFFNs, first layer first; none of a dense model.

    PEFT's modules_to_save keeps the originals beside the copies that it trains: those are left out.
    """
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, DSMoEFFN) and "original_module" not in name.split(".")
    ]


def ffn_layers(model: nn.Module) -> list[DSMoEFFN]:
    """The same; an error if the model has none."""
    ffns = find_ffns(model)
    if not ffns:
        raise ValueError(
            f"{type(model).__name__} has no DSMoEFFN: convert it first (dsmoe_ext.sparsify)"
        )
    return ffns


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Sets tau in every layer: fewer experts when raised (of "top_p": more), without retraining."""
    for ffn in ffn_layers(model):
        ffn.set_threshold(threshold)


def turn(model: nn.Module, value: float) -> None:
    """Sets in every layer what the method trades quality for work by (DSMoEFFN.turn)."""
    for ffn in ffn_layers(model):
        ffn.turn(value)


def start_step(model: nn.Module, step: int) -> None:
    """To be called before every optimiser step of methods that draw something then (MatFormer)."""
    for ffn in find_ffns(model):
        ffn.router.start_step(step)


def pack(model: nn.Module, **form: Any) -> nn.Module:
    """Packs all FFNs for inference on the CPU: faster, for their memory once more, or with bits=8
    or 4 for a half or a third of it (DSMoEFFN.pack)."""
    for ffn in ffn_layers(model):
        ffn.pack(**form)
    return model


def shard_routers(model: nn.Module, **options: Any) -> None:
    """FSDP2: gives every router a group of its own; call it before fully_shard of the layers.

    Routers are float32, and a group of parameters must have one dtype. options: as for fully_shard.
    (accelerate does this by itself.)
    """
    from torch.distributed.fsdp import fully_shard

    for ffn in ffn_layers(model):
        fully_shard(ffn.router, **options)


@dataclass(frozen=True)
class ActiveFraction:
    """Shares of the FFN, shared expert included, that the counted tokens used."""

    mean: float
    per_layer: list[float]
    num_tokens: int


def active_fraction(model: nn.Module) -> ActiveFraction:
    """The share of the FFNs that was used since this function last looked at them.

    Padding is excluded. `per_layer` follows model.modules(), which is the order of the layers. NaN
    where no token was seen.
    """
    ffns = ffn_layers(model)
    counts = [ffn.activity.read() for ffn in ffns]
    shares = [
        active_share(fresh, ffn.expert_offsets).item()
        for fresh, ffn in zip(counts, ffns, strict=True)
    ]
    return ActiveFraction(sum(shares) / len(shares), shares, int(counts[0][-1]))
