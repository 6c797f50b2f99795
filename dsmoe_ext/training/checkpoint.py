"""The checkpoints that Trainer writes in a run folder: which are whole, and how they go."""

import contextlib
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from ..errors import UserError
from ..files import CHECKPOINT_FILES, remove_owned

_NAME = re.compile(r"checkpoint-(\d+)")
_LAST = "trainer_state.json"  # what Trainer writes last


def find_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the complete checkpoints, oldest first."""
    found = []
    for path in Path(run_dir).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / _LAST).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The one to go on from; an error if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    found = find_checkpoints(run_dir)
    if not found:
        return None
    folder = found[-1][1]
    try:
        TrainerState.load_from_json(str(folder / _LAST))
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} is damaged ({error}); delete it") from None
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Deletes the files of a checkpoint and, if nothing else is in it, the folder."""
    remove_owned(folder, CHECKPOINT_FILES)
    with contextlib.suppress(OSError):
        folder.rmdir()


class KeepNewest(TrainerCallback):
    """Removes a checkpoint once a newer one is whole. Trainer's own limit deletes whole folders,
    whatever else lies in them."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for _, folder in find_checkpoints(Path(args.output_dir))[:-1]:
                remove_checkpoint(folder)
