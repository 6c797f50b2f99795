"""The rows of one table, measured or read, and how they are shown."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import console
from .record import Record, markdown

if TYPE_CHECKING:
    from .bench import Bench


class Rows:
    """A table of dsmoe experiment, kept in OUT/NAME.jsonl."""

    def __init__(self, out: Path, name: str):
        self.record = Record(out / f"{name}.jsonl")
        self.rows: list[dict[str, Any]] = []

    def add(
        self, bench: "Bench", name: str, measurement: Callable[[], dict[str, Any]], **what: Any
    ) -> None:
        """One row of one seed: losses by text and active shares, as Bench.losses gives them."""
        self.rows.append(self.record.measure(bench.what(row=name, **what), measurement))

    def add_dense(self, bench: "Bench", **what: Any) -> None:
        self.add(bench, "dense", lambda: bench.losses(bench.dense), **what)

    def add_calibrated(
        self,
        bench: "Bench",
        name: str,
        target: float,
        text: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        def measurement() -> dict[str, Any]:
            sparse, seconds = bench.calibrate(target, text and text(), **options)
            return bench.losses(sparse) | {"seconds": seconds}

        self.add(bench, name, measurement, target=target, **options)

    def cells(self, against: str) -> dict[str, dict[str, "Cell"]]:
        """By row and text, all seeds of a row together: ratios are to a row of the same seed."""
        from .bench import ratio

        base = {row["what"]["seed"]: row for row in self.rows if row["what"]["row"] == against}
        cells: dict[str, dict[str, Cell]] = {}
        for name in dict.fromkeys(row["what"]["row"] for row in self.rows):
            same = [row for row in self.rows if row["what"]["row"] == name]
            cells[name] = {
                text: Cell(
                    [ratio(row, base[row["what"]["seed"]], text) for row in same],
                    sum(row["active"][text] for row in same) / len(same),
                )
                for text in same[0]["loss"]
            }
        return cells

    def show(self, title: str, against: str = "dense") -> None:
        """Prints the table: ratios and active shares."""
        cells = self.cells(against)
        console.say(title)
        texts = next(iter(cells.values()))
        print(markdown(["", *texts], [[n, *map(str, row.values())] for n, row in cells.items()]))

    def draw(self) -> None:
        """OUT/NAME.png: perplexity over the active share, a panel for each text; nothing where
        matplotlib is not installed."""
        if find_spec("matplotlib") is None:
            return
        from .plot import draw

        cells = self.cells("dense")
        del cells["dense"]
        draw(cells, self.record.path.with_suffix(".png"))


@dataclass(frozen=True)
class Cell:
    """Perplexity as a multiple of another row's, seed by seed, and the mean active share."""

    ratios: list[float]
    active: float

    @property
    def mean(self) -> float:
        return sum(self.ratios) / len(self.ratios)

    @property
    def half_range(self) -> float:
        return (max(self.ratios) - min(self.ratios)) / 2

    def __str__(self) -> str:
        spread = f" ± {self.half_range:.3f}" if len(self.ratios) > 1 else ""
        return f"{self.mean:.3f}{spread} @{self.active:.3f}"
