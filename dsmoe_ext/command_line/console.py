"""What the commands show: results on stdout, progress on stderr, errors in one line.

On a terminal, long work has a bar with its rate and the time left; elsewhere (a file, a pipe, CI)
it is one line when it is done.
"""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..errors import UserError
from ..files import is_out_of_space

out = Console()
err = Console(stderr=True)


def say(message: str) -> None:
    """One line on stderr, never wrapped, never read as markup."""
    err.print(message, markup=False, highlight=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        if not speed:
            return Text(f"  ?  {unit}/s", style="dim")
        if speed < 1:
            return Text(f"{1 / speed:.2f} s/{unit.removesuffix('s')}", style="dim")
        return Text(f"{speed:,.1f} {unit}/s", style="dim")


@contextlib.contextmanager
def progress(label: str, total: int, unit: str = "steps") -> Iterator[Callable[..., None]]:
    """Yields advance(n=1, note=""), to be called as the work goes on."""
    start, last_note = time.perf_counter(), ""
    if not err.is_terminal:

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal last_note
            last_note = note or last_note

        yield advance
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task(label, total=total, unit=unit, note="")

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal last_note
                last_note = note or last_note
                bar.update(task, advance=n, note=last_note)

            yield advance
    seconds = time.perf_counter() - start
    note = f", {last_note}" if last_note else ""
    say(f"{label}: {total} {unit} in {duration(seconds)}{note}")


@contextlib.contextmanager
def stage(label: str) -> Iterator[None]:
    """Work whose length is not known in steps: a spinner with the time, then one line."""
    start = time.perf_counter()
    if err.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=err, transient=True) as bar:
            bar.add_task(label, total=None)
            yield
    else:
        yield
    say(f"{label}: {duration(time.perf_counter() - start)}")


def duration(seconds: float) -> str:
    """3.2 s, 1 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def explain(error: BaseException) -> str | None:
    """One line for an error that can be expected; None for a mistake of ours."""
    kind = type(error)
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_space(error):
        return "no space left on the device; nothing half-written was kept"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{(error.strerror or str(error)).lower()}{place}"
    if kind.__name__ == "SafetensorError":
        return f"a weight file is damaged ({error})"
    if is_out_of_memory(error):
        return "not enough memory; try a smaller --batch-size or --window"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in ("transformers", "safetensors", "accelerate", "gguf", "matplotlib"):
            return f"this command needs {package}: pip install 'dsmoe_ext[demo]'"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's error and for torch's texts."""
    texts = ("can't allocate memory", "CUDA out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


class Commands(typer.core.TyperGroup):
    """The command group: every error of every command ends here, in one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("dsmoe: interrupted; nothing half-written was kept")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if is_usage_error(error) or isinstance(error, BrokenPipeError):
                raise  # worded, or silenced, by the command line library
            if os.environ.get("DSMOE_DEBUG"):
                traceback.print_exc()
            message = explain(error)
            if message is None:
                first = (str(error).strip() or "no message").splitlines()[0]
                message = (
                    f"unexpected {type(error).__name__}: {first} (DSMOE_DEBUG=1 shows where; "
                    "please report it with the output of python -m dsmoe_ext)"
                )
            say("dsmoe: error: " + " ".join(message.split()))
            raise typer.Exit(1) from None


def is_usage_error(error: BaseException) -> bool:
    """Wrong options and arguments, which the command line library words itself (exit code 2)."""
    return any(kind.__name__ in ("ClickException", "Exit", "Abort") for kind in type(error).__mro__)


@contextlib.contextmanager
def expect(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds in the block are the user's to put right, with the text they have."""
    try:
        yield
    except kinds as error:
        if is_out_of_space(error):
            raise
        raise UserError(str(error)) from error


def prepare_streams() -> None:
    """A terminal whose encoding lacks a letter, or a path that is no text, gets a ? for it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def stop_on_terminate() -> None:
    """A polite kill ends like Ctrl-C: half-written output is removed."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
