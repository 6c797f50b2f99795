"""run.json: what a run was started with, so that it is not resumed as another one."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import atomic_file, json_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "run.json"


def tensors_digest(model: "PreTrainedModel") -> str:
    """Names a model's tensors and their shapes."""
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def write_record(run_dir: Path, checks: dict[str, Any]) -> None:
    with atomic_file(run_dir / RECORD) as partial:
        partial.write_text(json_text(checks, indent=1), encoding="utf-8")


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """None: an older version did not write it down."""
    try:
        return json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{run_dir / RECORD} is damaged ({error})") from None


def check_same(run_dir: Path, wanted: dict[str, Any]) -> None:
    """Refuses to go on with other settings: the losses would belong to neither run."""
    recorded = read_record(run_dir)
    if recorded is None:
        return
    old, new = _flat(recorded), _flat(wanted)
    changed = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
    # Another window makes other data, another model other tensors: the cause comes first.
    changed.sort(key=lambda name: (name in ("data", "tensors"), name))
    if changed:
        name = changed[0]
        raise UserError(
            f"cannot resume with another {name}: the run has {old.get(name)}, "
            f"now it is {new.get(name)}; use the same, or --overwrite to start again"
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    nested = tree["settings"] | tree["identity"]
    return nested | {name: tree.get(name) for name in ("data", "tensors", "bf16")}
