"""Checkpoints of a training run: complete or absent, without pickle, resumed to the same bits.

A checkpoint is a directory `checkpoint-<step>` of
    model.safetensors       every tensor of the state dict, as it lies in memory (fp32 stays fp32)
    optimizer.safetensors   "<parameter index>.<name>" → the moments and step counts of AdamW
    random.safetensors      torch's generators (CPU, every CUDA device) and those of the FFN layers
    state.json              step, learning rates, controller, settings, and the checks on resuming
written into a hidden neighbour and renamed, so that a kill at any moment leaves the one before it.
"""

import contextlib
import json
import random
import re
from pathlib import Path

import torch

from ..errors import UserError
from ..files import CHECKPOINT_FILES, atomic_directory, remove_owned

_NAME = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the complete checkpoints, oldest first."""
    found = []
    for path in Path(run_dir).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / "state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(run_dir: Path, step: int, model, optimizer, state: dict, keep: int = 1) -> Path:
    """Writes checkpoint-<step> and then deletes all but the newest `keep`."""
    from safetensors.torch import save_file

    target = Path(run_dir) / f"checkpoint-{step}"
    with atomic_directory(target, overwrite=True, owns=CHECKPOINT_FILES) as folder:
        save_file(_model_tensors(model), folder / "model.safetensors")
        groups = optimizer.state_dict()
        moments = {
            f"{index}.{name}": value.contiguous()
            for index, entry in groups["state"].items()
            for name, value in entry.items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        save_file(_random_states(model), folder / "random.safetensors")
        record = {
            "step": step,
            "param_groups": groups["param_groups"],
            "python_random": random.getstate(),
            **state,
        }
        (folder / "state.json").write_text(json.dumps(record))
    for _, old in find_checkpoints(run_dir)[:-keep]:
        remove_checkpoint(old)
    return target


def remove_checkpoint(folder: Path) -> None:
    """Deletes the files of a checkpoint and, if nothing else is in it, the folder."""
    remove_owned(folder, CHECKPOINT_FILES)
    with contextlib.suppress(OSError):
        folder.rmdir()


def load_checkpoint(folder: Path, model, optimizer) -> dict:
    """Puts everything back in place and returns state.json."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        randoms = load_file(folder / "random.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} is damaged ({error}); delete it") from None
    own = _model_tensors(model)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise UserError(f"{folder} belongs to another model: its tensors differ in name or shape")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    entries: dict[int, dict] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": record["param_groups"]})
    _restore_random_states(model, randoms)
    version, internal, gauss = record["python_random"]
    random.setstate((version, tuple(internal), gauss))
    return record


def _model_tensors(model) -> dict[str, torch.Tensor]:
    """The state dict, each storage once (tied weights are one)."""
    tensors, seen = {}, set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor.detach()
    return tensors


def _generators(model) -> dict[str, torch.Generator]:
    """Generators that layers hold for themselves (the draws of the sampled STE)."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Generator):
                found[f"{path}.{name}"] = value
    return found


def _random_states(model) -> dict[str, torch.Tensor]:
    states = {"torch.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"torch.cuda.{index}"] = state
    for name, generator in _generators(model).items():
        states[f"layer.{name}"] = generator.get_state()
    return states


def _restore_random_states(model, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch.cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"torch.cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"torch.cuda.{index}"], index)
    for name, generator in _generators(model).items():
        if f"layer.{name}" in states:
            generator.set_state(states[f"layer.{name}"])
