"""Results of one experiment as JSON lines: a row that is there is not measured again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..command_line import console
from ..errors import UserError


class Record:
    """The file OUT/NAME.jsonl. What decides a row (`what`: model, text, seed ..) names it."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):  # a killed run's last line
                    path.write_text("".join(lines[:-1]), encoding="utf-8")
                    break
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    raise UserError(
                        f"{path}, line {number} is not JSON: mend or remove it"
                    ) from None

    def measure(
        self, what: dict[str, Any], measurement: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The row of `what`: from the file, or measured now and written at once."""
        for row in self.rows:
            if row["what"] == what:
                return row
        console.say(", ".join(f"{name} {value}" for name, value in what.items()))
        row = {"what": what, **measurement()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
