"""The log of a training run: one JSON object a line, and TensorBoard where it is installed."""

import json
import os
from pathlib import Path

from ..files import atomic_file, json_text


class TrainingLog:
    """Appends one row per step to train.jsonl; a resumed run drops the rows after its step."""

    def __init__(self, run_dir: Path | None, resume_step: int = 0, tensorboard: bool = True):
        self.rows: list[dict] = []
        self._file = self._writer = None
        if run_dir is None:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "train.jsonl"
        if resume_step:
            self.rows = [row for row in read_log(path) if row["step"] <= resume_step]
        with atomic_file(path) as partial:
            partial.write_text("".join(json_text(row) + "\n" for row in self.rows))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            self._writer = _tensorboard_writer(run_dir / "tensorboard", resume_step)

    def write(self, row: dict) -> None:
        """One step; numbers go to TensorBoard under their names, lists as one curve per layer."""
        self.rows.append(row)
        if self._file:
            self._file.write(json_text(row) + "\n")
            self._file.flush()
        if self._writer:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, row["step"])
                elif isinstance(value, list):
                    for layer, number in enumerate(value):
                        self._writer.add_scalar(f"{name}/layer_{layer:02d}", number, row["step"])

    def close(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._writer:
            self._writer.close()


def read_log(path: Path) -> list[dict]:
    """The rows of a log; a last line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _tensorboard_writer(folder: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # absent, or present and broken: the JSONL holds everything anyway
        return None
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
