"""The rows of one table, measured or read, and how they are shown."""

from collections.abc import Callable
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

    def show(self, title: str, against: str = "dense") -> None:
        """Prints the table: ratios to a row of the same seed, and active shares."""
        from .bench import ratio

        base = {row["what"]["seed"]: row for row in self.rows if row["what"]["row"] == against}
        texts = list(next(iter(base.values()))["loss"])
        cells = []
        for name in dict.fromkeys(row["what"]["row"] for row in self.rows):
            same = [row for row in self.rows if row["what"]["row"] == name]
            cell = [name]
            for text in texts:
                ratios = [ratio(row, base[row["what"]["seed"]], text) for row in same]
                active = sum(row["active"][text] for row in same) / len(same)
                spread = f" ± {(max(ratios) - min(ratios)) / 2:.3f}" if len(same) > 1 else ""
                cell.append(f"{sum(ratios) / len(ratios):.3f}{spread} @{active:.3f}")
            cells.append(cell)
        console.say(title)
        print(markdown(["", *texts], cells))
